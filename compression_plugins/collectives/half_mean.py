"""A mean in 16-bit floats of which nothing is lost."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Literal

from .._lazy import torch
from ..codecs import Cast
from ..core.memory import ERROR_FEEDBACK, Memory, Vector
from .payloads import gather_mean, scatter_mean
from .shards import decode_shards, even_shards

if TYPE_CHECKING:
    from torch import Tensor

    from ..core.call import Call, Program

Half = Literal["fp16", "bf16"]
_WORD = 2  # values in a 4-byte word, at which shards are cut


def half_mean(call: Call, values: Tensor, kind: Half) -> Program[tuple[Tensor, Tensor]]:
    """Mean over ranks of `values` (fp32 [k], overwritten), which travel as fp16 or bf16 and are added in fp32.

    An all-to-all of shards, an fp32 sum by the owner of each shard, an all-gather: the bytes of an all-reduce of 16-bit
    values. Such an all-reduce would add in 16 bits, differently on every backend, and nobody could tell what it lost.
    Here each of the two roundings is done by a rank that knows its error. (Between two ranks one all-gather sends as
    much and rounds once.) Values beyond the format's range are sent as its largest number; NaN stays NaN.

    Returns:
        (mean fp32 [k], the same bits on every rank; lost fp32 [k], this rank's own). The mean over ranks of
        (values - lost) is the mean: with `lost` added to its residual, a memory still remembers all that was not sent.
        What the owner lost in rounding the mean counts n-fold in its own `lost`.
    """
    codec, size, rank, law = Cast(kind), call.transport.size, call.transport.rank, Memory(alpha=0.0)
    sendable, lost = _sendable(values, kind)
    outward = replace(call, state=_Loss(lost))
    if size <= 2:
        return (yield from gather_mean(codec, law, outward, sendable)), lost

    shards = even_shards(values.numel(), size, _WORD)
    mean = yield from scatter_mean(codec, law, replace(outward, shards=shards), sendable)
    own, mine = shards[rank], mean.split(shards)[rank]
    slot = torch.zeros(codec.nbytes(max(shards)), dtype=torch.uint8, device=mean.device)
    rounding = torch.zeros_like(mine)
    if own:
        codec.encode(mine, call.key, ERROR_FEEDBACK, Vector(rounding, rounding), out=slot[: codec.nbytes(own)])
        lost.split(shards)[rank].add_(rounding, alpha=size)
    outbox = yield call.transport.all_gather(slot)
    return decode_shards(codec, outbox, shards, mean), lost


def half_scatter(call: Call, values: Tensor, shards: Sequence[int], kind: Half) -> Program[tuple[Tensor, Tensor]]:
    """The same where a rank needs the mean of its own shard only: one rounding.

    Returns:
        (mean fp32 [shards[rank]]; lost fp32 [k], this rank's own).
    """
    sendable, lost = _sendable(values, kind)
    outward = replace(call, state=_Loss(lost), shards=shards)
    mean = yield from scatter_mean(Cast(kind), Memory(alpha=0.0), outward, sendable)
    return mean.split(list(shards))[call.transport.rank], lost


def _sendable(values: Tensor, kind: Half) -> tuple[Tensor, Tensor]:
    """`values` (overwritten) within the range of the format, and what lies beyond it."""
    limit = torch.finfo(torch.float16 if kind == "fp16" else torch.bfloat16).max
    sendable = values.clamp(-limit, limit)
    return sendable, values.sub_(sendable).nan_to_num_(0.0)


class _Loss:
    """Slots whose one vector takes what rounding loses."""

    def __init__(self, lost: Tensor) -> None:
        self._lost = lost

    def vector(self, slot: str, peer: int | None = None) -> Tensor:
        return self._lost

    def exchange(self, slot: str, peer: int | None = None) -> Vector:
        return Vector(self._lost, self._lost)

    def tensor(self, slot: str, name: str, make: Callable[[], Tensor]) -> Tensor:
        return make()


def half_mean_bits(numel: int, size: int, kind: Half) -> float:
    """Bits that each of `size` ranks sends for the mean of `numel` values, the mean over ranks."""
    codec = Cast(kind)
    if size <= 2:
        return (size - 1) * codec.payload_bits(numel)
    payloads = [codec.payload_bits(shard) for shard in even_shards(numel, size, _WORD)]
    return sum(payloads) * (size - 1) / size + (size - 1) * max(payloads)
