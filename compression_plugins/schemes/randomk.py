"""Random-k sparsification on coordinates that all ranks draw alike."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, ClassVar

from pydantic import Field

from .. import triton_kernels as K
from .._lazy import torch
from ..codecs.chunks import chunk_scatter
from ..core.call import Call, Reduction, Segment, total
from ..core.memory import ERROR_FEEDBACK, Memory
from .base import Operation, Scheme
from .registry import register

if TYPE_CHECKING:
    from torch import Tensor


@register
class RandomK(Scheme):
    """A shared random choice of coordinates: no indices travel and the values may be summed.

    One coordinate is drawn uniformly from every run of `ratio` neighbours, instead of k from all of them: each
    coordinate has the same chance of 1 / ratio, and neither a permutation nor a sort is needed. What is not drawn is
    remembered.
    """

    name: ClassVar[str] = "randomk"
    paper: ClassVar[str] = "Stich et al., 2018, arXiv 1809.07599"
    suits_adam: ClassVar[bool] = False
    sums_only: ClassVar[bool] = True

    ratio: Annotated[int, Field(ge=1, le=65536)] = Field(100, description="keep one value in so many")

    @property
    def memory(self) -> Memory | None:
        return ERROR_FEEDBACK

    @property
    def operations(self) -> frozenset[Operation]:
        return frozenset(("mean", "scatter_mean"))

    def mean(self, x: Tensor, call: Call) -> Reduction:
        indices = self._draw(x, call, -(-x.numel() // self.ratio))
        values = K.chunk_gather(x, indices, self.ratio, **ERROR_FEEDBACK.kernel_arguments(call.residual()))
        total = yield call.transport.all_reduce(values)
        return chunk_scatter(indices, total.div_(call.transport.size), self.ratio, x)

    def scatter_mean(self, x: Tensor, call: Call) -> Reduction:
        """Runs of neighbours begin anew with each shard."""
        shards, rank, residual = list(call.shards or ()), call.transport.rank, call.residual()
        counts = [-(-n // self.ratio) for n in shards]
        indices = self._draw(x, call, sum(counts)).split(counts)
        values, start = [], 0
        for part, chosen in zip(x.split(shards), indices):
            memory = ERROR_FEEDBACK.kernel_arguments(residual.part(start, start + part.numel()))
            start += part.numel()
            if part.numel():
                values.append(K.chunk_gather(part, chosen, self.ratio, **memory))
        total = yield call.transport.reduce_scatter(torch.cat(values), counts)
        if shards[rank]:
            chunk_scatter(indices[rank], total.div_(call.transport.size), self.ratio, x.split(shards)[rank])
        return x

    def _draw(self, x: Tensor, call: Call, count: int) -> Tensor:
        """int32 [count], a place in each run, the same on every rank."""
        draws = K.uniform16(call.key._replace(rank=0), count, device=x.device)
        return (draws.to(torch.int64) * self.ratio >> 16).to(torch.int32)

    def wire_bits(self, segments: Sequence[Segment], size: int) -> float:
        return 64 * -(-total(segments) // self.ratio) * (size - 1) / size

    def scatter_bits(self, segments: Sequence[Segment], size: int) -> float:
        return self.wire_bits(segments, size) / 2
