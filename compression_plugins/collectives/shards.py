"""Vectors cut into shards, one per owner, and the payloads of all shards from one kernel."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile
from typing import TYPE_CHECKING

from .._lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

    from ..codecs import Codec
    from ..core.memory import Memory, Vector
    from ..triton_kernels import Key

_LONG = 1 << 17  # values of a shard


def even_shards(numel: int, size: int, block: int) -> list[int]:
    """`numel` cut into `size` shards at multiples of `block`, as even as that allows; the last ones may be short or
    empty.
    """
    length = -(-numel // (size * block)) * block
    return [max(0, min(length, numel - rank * length)) for rank in range(size)]


def encode_shards(
    codec: Codec, x: Tensor, shards: Sequence[int], key: Key, memory: Memory | None, residual: Vector | None
) -> Tensor:
    """The payloads of the shards of flat `x`, one behind the other, uint8; `residual.new` is written.

    Short shards of one length are encoded by one kernel, whose scales and codes are then dealt out: a call for each
    would take longer than the work where ranks are many. No two shards share a random counter.
    """
    from ..triton_kernels.philox import LANES  # which imports torch

    lengths = [codec.nbytes(n) for n in shards]
    outbox = torch.empty(sum(lengths), dtype=torch.uint8, device=x.device)
    joint = _joint(codec, x, shards)
    start = counter = joint * shards[0]
    if joint:
        payload = codec.encode(x[:start], key, memory, residual.part(0, start) if residual else None)
        cut = codec.scale_bytes(shards[0]) or 0
        rows = outbox[: payload.numel()].view(joint, -1)
        rows[:, :cut] = payload[: joint * cut].view(joint, -1)
        rows[:, cut:] = payload[joint * cut :].view(joint, -1)
    rest = outbox[sum(lengths[:joint]) :].split(lengths[joint:])
    for numel, slot in zip(shards[joint:], rest):
        part = slice(start, start + numel)
        if numel:
            own = key._replace(offset=counter)
            codec.encode(x[part], own, memory, residual.part(part.start, part.stop) if residual else None, out=slot)
        start = part.stop
        counter += -(-numel // LANES) * LANES
    return outbox


def decode_shards(codec: Codec, slots: Tensor, shards: Sequence[int], out: Tensor) -> Tensor:
    """Flat fp32 `out`, from the payload at the front of each row of `slots` (uint8 [size, bytes])."""
    joint = _joint(codec, out, shards)
    end = joint * shards[0]
    if joint:
        cut = codec.scale_bytes(shards[0]) or 0
        rows = slots[:joint, : codec.nbytes(shards[0])]
        codec.decode(torch.cat([rows[:, :cut].reshape(-1), rows[:, cut:].reshape(-1)]), end, out=out[:end])
    for slot, numel, part in zip(slots[joint:], shards[joint:], out[end:].split(list(shards[joint:]))):
        if numel:
            codec.decode(slot[: codec.nbytes(numel)], numel, out=part)
    return out


def _joint(codec: Codec, x: Tensor, shards: Sequence[int]) -> int:
    """How many shards of `x` to code by one call: those at the front whose payloads together are the payload of their
    values in a row; none where a call for each costs a CPU less than the copy of its payload.
    """
    first = shards[0]
    scales = codec.scale_bytes(first)
    if scales is None or not first or (scales and first % codec.block) or (x.is_cpu and first >= _LONG):
        return 0
    count = sum(1 for _ in takewhile(lambda numel: numel == first, shards))
    return count if count > 1 and codec.nbytes(count * first) == count * codec.nbytes(first) else 0
