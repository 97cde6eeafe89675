"""Sends fewer bytes and compresses nothing: the bound of what any compression can gain on a network."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, ClassVar

from pydantic import Field

from .._lazy import torch
from ..core.call import Call, Reduction, Segment, total
from .base import Operation, Scheme
from .registry import register

if TYPE_CHECKING:
    from torch import Tensor


@register
class Fake(Scheme):
    """All-reduces the first of every `ratio` parts of a bucket; the rest of the average is zeros.

    No codec costs less than none, so a step under `fake` bounds the step of every scheme that sends as many bytes.
    It is for measuring time: a model does not train with it.
    """

    name: ClassVar[str] = "fake"
    paper: ClassVar[str] = "-"
    sums_only: ClassVar[bool] = True
    trains: ClassVar[bool] = False

    ratio: Annotated[int, Field(ge=1, le=65536)] = Field(100, description="send one value in so many")

    def mean(self, x: Tensor, call: Call) -> Reduction:
        count = -(-x.numel() // self.ratio)
        sums = yield call.transport.all_reduce(x[:count])
        x[:count] = sums.div_(call.transport.size)
        x[count:] = 0
        return x

    @property
    def operations(self) -> frozenset[Operation]:
        return frozenset(("mean", "scatter_mean"))

    def scatter_mean(self, x: Tensor, call: Call) -> Reduction:
        shards = list(call.shards or ())
        counts = [-(-n // self.ratio) for n in shards]
        parts = x.split(shards)
        mine = parts[call.transport.rank]
        first = torch.cat([part[:count] for part, count in zip(parts, counts)])
        sums = yield call.transport.reduce_scatter(first, counts)
        mine.zero_()[: len(sums)] = sums.div_(call.transport.size)
        return x

    def wire_bits(self, segments: Sequence[Segment], size: int) -> float:
        return 64 * -(-total(segments) // self.ratio) * (size - 1) / size

    def scatter_bits(self, segments: Sequence[Segment], size: int) -> float:
        return self.wire_bits(segments, size) / 2
