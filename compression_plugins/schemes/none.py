"""No compression: the control, and the way of exempt tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

from ..registry import register
from .base import Call, Reduction, Scheme, Segment, total

if TYPE_CHECKING:
    from torch import Tensor


@register
class NoCompression(Scheme):
    """Dense fp32 all-reduce."""

    name: ClassVar[str] = "none"
    paper: ClassVar[str] = "-"
    sums_only: ClassVar[bool] = True
    host_dense: ClassVar[bool] = True

    def reduce(self, x: Tensor, call: Call) -> Reduction:
        from ..collectives import dense_sum

        return (yield from dense_sum(call, x))

    def wire_bits(self, segments: Sequence[Segment], size: int) -> float:
        return 64 * total(segments) * (size - 1) / size
