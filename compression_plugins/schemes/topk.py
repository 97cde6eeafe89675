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
from .base import Scheme
from .registry import register

if TYPE_CHECKING:
    from torch import Tensor


@register
class TopK(Scheme):
    """Every rank sends its own largest values with their places; the rest is remembered.

    With a `decay` below 1 what is remembered fades, as in SparseLoCo (Sarfi et al., 2025, arXiv 2508.15706): m <- decay
    m + g, and m less its largest values is kept. That is an addition of ours to the method.

    Payload: int32 places, then fp32 values; 64 bits for each kept value, received from every rank.
    """

    name: ClassVar[str] = "topk"
    paper: ClassVar[str] = "Stich et al., 2018, arXiv 1809.07599"
    suits_adam: ClassVar[bool] = False

    ratio: Annotated[float, Field(ge=1, le=1 << 24)] = Field(100.0, description="keep one value in so many")
    decay: Annotated[float, Field(gt=0, le=1)] = Field(1.0, description="of what is remembered, kept at each step")

    @property
    def memory(self) -> Memory:
        return Memory(alpha=self.decay, decay=self.decay)

    def mean(self, x: Tensor, call: Call) -> Reduction:
        residual = call.residual()
        p = self.memory.compensate(x, residual)
        p = p.where(finite(p), torch.nan)
        k = self._kept(x.numel())
        indices = largest(p, k)
        values = p[indices]
        decoded = torch.zeros_like(p)
        decoded[indices] = values
        self.memory.update(x, residual, decoded)
        payload = torch.cat([indices.to(torch.int32).view(torch.uint8), values.view(torch.uint8)])
        payloads = yield call.transport.all_gather(payload)
        result = x.zero_()
        for row in payloads:
            where = row[: 4 * k].view(torch.int32)
            K.scatter_add(where, row[4 * k :].view(torch.float32), result, weight=1 / call.transport.size)
        return result

    def wire_bits(self, segments: Sequence[Segment], size: int) -> float:
        return 64 * self._kept(total(segments)) * (size - 1)

    def _kept(self, numel: int) -> int:
        return min(numel, max(1, round(numel / self.ratio)))
