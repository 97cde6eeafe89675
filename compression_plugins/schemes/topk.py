"""Top-k sparsification with error feedback."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, ClassVar

from pydantic import Field

from .. import triton_kernels as K
from .._lazy import torch
from ..codecs.largest import largest
from ..core.call import Call, Reduction, Segment, total
from ..core.memory import Memory, finite
from .base import Operation, Scheme
from .registry import register

if TYPE_CHECKING:
    from torch import Tensor


@register
class TopK(Scheme):
    """Every rank sends its own largest values with their places; the rest is remembered.

    With a `decay` below 1 what is remembered fades, as in SparseLoCo (Sarfi et al., 2025, arXiv 2508.15706): m <- decay
    m + g, and m less its largest values is kept. That is an addition of ours to the method.

    Payload: int32 places, then fp32 values; 64 bits for each kept value, received from every rank.

    A reduce-scatter takes the largest of each shard instead of the whole bucket, which makes all messages of known
    length: 64 bits for each kept value, sent once, to the owner of its shard.
    """

    name: ClassVar[str] = "topk"
    paper: ClassVar[str] = "Stich et al., 2018, arXiv 1809.07599"
    suits_adam: ClassVar[bool] = False

    ratio: Annotated[float, Field(ge=1, le=1 << 24)] = Field(100.0, description="keep one value in so many")
    decay: Annotated[float, Field(gt=0, le=1)] = Field(1.0, description="of what is remembered, kept at each step")

    @property
    def memory(self) -> Memory:
        return Memory(alpha=self.decay, decay=self.decay)

    @property
    def operations(self) -> frozenset[Operation]:
        return frozenset(("mean", "scatter_mean"))

    def mean(self, x: Tensor, call: Call) -> Reduction:
        (payload,) = self._payloads(x, call, [x.numel()])
        payloads = yield call.transport.all_gather(payload)
        return _mean(payloads, x)

    def scatter_mean(self, x: Tensor, call: Call) -> Reduction:
        shards, size = list(call.shards or ()), call.transport.size
        payloads = self._payloads(x, call, shards)
        lengths = [len(payload) for payload in payloads]
        own = lengths[call.transport.rank]
        inbox = yield call.transport.all_to_all(torch.cat(payloads), lengths, [own] * size)
        _mean(inbox.view(size, own), x.split(shards)[call.transport.rank])
        return x

    def _payloads(self, x: Tensor, call: Call, shards: Sequence[int]) -> list[Tensor]:
        """What is sent of each shard, uint8 [8 * kept]; the rest is remembered."""
        residual = call.residual()
        p = self.memory.compensate(x, residual)
        p = p.where(finite(p), torch.nan)
        decoded, payloads = torch.zeros_like(p), []
        for part, out in zip(p.split(list(shards)), decoded.split(list(shards))):
            indices = largest(part, self._kept(part.numel()))
            values = out[indices] = part[indices]
            payloads.append(torch.cat([indices.to(torch.int32).view(torch.uint8), values.view(torch.uint8)]))
        self.memory.update(x, residual, decoded)
        return payloads

    def wire_bits(self, segments: Sequence[Segment], size: int) -> float:
        return 64 * self._kept(total(segments)) * (size - 1)

    def scatter_bits(self, segments: Sequence[Segment], size: int) -> float:
        return self.wire_bits(segments, size) / size

    def _kept(self, numel: int) -> int:
        return min(numel, max(1, round(numel / self.ratio)))


def _mean(payloads: Tensor, out: Tensor) -> Tensor:
    """`out` (fp32), which becomes the mean of the rows of `payloads` (uint8 [ranks, 8 * kept])."""
    places = payloads.shape[1] // 2
    out.zero_()
    for row in payloads if places else ():
        where = row[:places].view(torch.int32)
        K.scatter_add(where, row[places:].view(torch.float32), out, weight=1 / len(payloads))
    return out
