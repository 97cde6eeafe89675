"""A mean in 16-bit floats of which nothing is lost."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Literal

from ..codecs import Cast
from ..memories import ERROR_FEEDBACK, Memory
from .payloads import gather
from .shards import decode_shards, even_shards

if TYPE_CHECKING:
    from torch import Tensor

    from ..schemes.base import Call, Phases

Half = Literal["fp16", "bf16"]
_WORD = 2  # values in a 4-byte word, at which shards are cut


def half_mean(call: Call, values: Tensor, kind: Half) -> Phases[tuple[Tensor, Tensor]]:
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
    import torch

    codec, size, rank = Cast(kind), call.transport.size, call.transport.rank
    limit = torch.finfo(torch.float16 if kind == "fp16" else torch.bfloat16).max
    sendable = values.clamp(-limit, limit)
    lost = values.sub_(sendable).nan_to_num_(0.0)

    shards = even_shards(values.numel(), size, _WORD) if size > 2 else None
    outward = replace(call, shards=shards, residual=lambda: lost)
    mean = yield from gather(codec, Memory(alpha=0.0), outward, sendable)
    if shards is None:
        return mean, lost

    own, mine = shards[rank], mean.split(shards)[rank]
    slot = torch.zeros(codec.nbytes(max(shards)), dtype=torch.uint8, device=mean.device)
    rounding = torch.zeros_like(mine)
    if own:
        codec.encode(mine, call.key, ERROR_FEEDBACK, rounding, out=slot[: codec.nbytes(own)])
        lost.split(shards)[rank].add_(rounding, alpha=size)
    outbox = yield call.transport.all_gather(slot)
    return decode_shards(codec, outbox, shards, mean), lost


def half_mean_bits(numel: int, size: int, kind: Half) -> float:
    """Bits that each of `size` ranks sends for the mean of `numel` values, the mean over ranks."""
    codec = Cast(kind)
    if size <= 2:
        return (size - 1) * codec.payload_bits(numel)
    payloads = [codec.payload_bits(shard) for shard in even_shards(numel, size, _WORD)]
    return sum(payloads) * (size - 1) / size + (size - 1) * max(payloads)
