"""Top-k sparsification with error feedback."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, ClassVar

from pydantic import Field

from .. import triton_kernels as K
from .._lazy import torch
from ..codecs.largest import largest
from ..core.call import Call, Reduction, Segment, total
from ..core.memory import ERROR_FEEDBACK, Memory, finite
from .base import Scheme
from .registry import register

if TYPE_CHECKING:
    from torch import Tensor


@register
class TopK(Scheme):
    """Every rank sends its own largest values with their places; the rest is remembered.

    Payload: int32 places, then fp32 values; 64 bits for each kept value, received from every rank.
    """

    name: ClassVar[str] = "topk"
    paper: ClassVar[str] = "Stich et al., 2018, arXiv 1809.07599"
    suits_adam: ClassVar[bool] = False

    ratio: Annotated[float, Field(ge=1)] = Field(100.0, description="keep one value in so many")

    @property
    def memory(self) -> Memory | None:
        return ERROR_FEEDBACK

    def mean(self, x: Tensor, call: Call) -> Reduction:
        residual = call.residual()
        p = ERROR_FEEDBACK.compensate(x, residual)
        p = p.where(finite(p), torch.nan)
        k = self._kept(x.numel())
        indices = largest(p, k)
        values = p[indices]
        decoded = torch.zeros_like(p)
        decoded[indices] = values
        ERROR_FEEDBACK.update(x, residual, decoded)
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
