"""ScaleCom: sparsification whose traffic does not grow with the number of workers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from .. import triton_kernels as K
from .._lazy import torch
from ..codecs.chunks import chunk_add, chunk_scatter
from ..codecs.largest import largest
from ..collectives import dense_mean, half_mean, half_mean_bits, shared_index
from ..core.call import Call, Reduction, Segment, total
from ..core.memory import Memory, Vector, finite
from .base import Scheme
from .registry import register

if TYPE_CHECKING:
    from torch import Tensor


@register
class ScaleCom(Scheme):
    """Cyclic local top-k (CLT-k): at each step one rank, in turn, chooses the coordinates for all.

    The leader of step t is rank t mod n. `selection: chunk` keeps the largest of every `ratio` neighbours, in one pass;
    `exact` the k largest of the bucket. A low-pass filter damps the residual: m <- (1 - beta) m + beta (p - sent), here
    as p = g + beta r and r <- r + g - sent with r = m / beta, which is the same recursion.

    Wire: places from the leader, ceil(log2 ratio) bits per chunk (at least 1; `exact`: 32 bits per value), then an
    all-reduce of the kept values. `values: fp16` and `bf16` halve the latter: ranks still add in fp32, and what the
    rounding takes away goes to the residual (`half_mean`), so `sent` above is the rounded value.
    """

    name: ClassVar[str] = "scalecom"
    paper: ClassVar[str] = "Chen et al., 2020, arXiv 2104.11125"
    suits_adam: ClassVar[bool] = False

    ratio: Annotated[int, Field(ge=1, le=65536)] = Field(100, description="keep one gradient value in so many")
    beta: Annotated[float, Field(gt=0, le=1)] = Field(1.0, description="low-pass filter of the residual; 1: none")
    selection: Literal["chunk", "exact"] = Field("chunk", description="largest of each chunk, or of the whole bucket")
    values: Literal["fp32", "fp16", "bf16"] = Field("fp32", description="format of the kept values on the wire")

    @property
    def memory(self) -> Memory | None:
        return Memory(alpha=self.beta)

    def mean(self, x: Tensor, call: Call) -> Reduction:
        choice = _Chunks if self.selection == "chunk" else _Exact
        leader = call.clock.step % call.transport.size
        selector = choice(x, self.ratio, Memory(alpha=self.beta), call.residual())
        places, values = yield from shared_index(
            call.transport,
            leader,
            selector.select,
            selector.gather,
            selector.placeholder,
        )
        if self.values == "fp32":
            mean = yield from dense_mean(call, values)
        else:
            mean, lost = yield from half_mean(call, values, self.values)
            selector.remember(places, lost)
        return selector.scatter(places, mean)

    def wire_bits(self, segments: Sequence[Segment], size: int) -> float:
        kept = -(-total(segments) // self.ratio)
        index_bits = 32 * -(-kept * _width(self.ratio) // 32) if self.selection == "chunk" else 32 * kept
        around = (size - 1) / size
        values = 64 * kept * around if self.values == "fp32" else half_mean_bits(kept, size, self.values)
        return index_bits * around + values


class _Chunks:
    """One value out of every `ratio` neighbours; places are offsets inside the chunk."""

    def __init__(self, x: Tensor, ratio: int, memory: Memory, residual: Vector) -> None:
        self.x, self.ratio, self.residual, self.kept = x, ratio, residual, -(-x.numel() // ratio)
        self.arguments = memory.kernel_arguments(residual)

    def select(self) -> tuple[Tensor, Tensor]:
        indices, values = K.chunk_select(self.x, self.ratio, **self.arguments)
        return K.pack_bits(indices, _width(self.ratio)), values

    def gather(self, payload: Tensor) -> Tensor:
        return K.chunk_gather(self.x, self._unpack(payload), self.ratio, **self.arguments)

    def placeholder(self) -> Tensor:
        nbytes = 4 * -(-self.kept * _width(self.ratio) // 32)
        return torch.empty(nbytes, dtype=torch.uint8, device=self.x.device)

    def remember(self, payload: Tensor, lost: Tensor) -> None:
        chunk_add(self._unpack(payload), lost, self.ratio, self.residual.new)

    def scatter(self, payload: Tensor, values: Tensor) -> Tensor:
        return chunk_scatter(self._unpack(payload), values, self.ratio, self.x)

    def _unpack(self, payload: Tensor) -> Tensor:
        return K.unpack_bits(payload, self.kept, _width(self.ratio))


class _Exact:
    """The k largest values of the whole bucket; places are int32."""

    def __init__(self, x: Tensor, ratio: int, memory: Memory, residual: Vector) -> None:
        self.x, self.memory, self.residual, self.kept = x, memory, residual, -(-x.numel() // ratio)
        p = memory.compensate(x, residual)
        self.p = p.where(finite(p), torch.nan)

    def select(self) -> tuple[Tensor, Tensor]:
        indices = largest(self.p, self.kept).to(torch.int32)
        payload = indices.view(torch.uint8)
        return payload, self.gather(payload)

    def gather(self, payload: Tensor) -> Tensor:
        indices = self._checked(payload)
        values = self.p[indices]
        self.memory.update(self.x, self.residual, torch.zeros_like(self.p).index_copy_(0, indices, values))
        return values

    def placeholder(self) -> Tensor:
        return torch.empty(4 * self.kept, dtype=torch.uint8, device=self.x.device)

    def remember(self, payload: Tensor, lost: Tensor) -> None:
        self.residual.new.index_add_(0, self._checked(payload), lost)

    def scatter(self, payload: Tensor, values: Tensor) -> Tensor:
        return self.x.zero_().index_copy_(0, self._checked(payload), values)

    def _checked(self, payload: Tensor) -> Tensor:
        return payload.view(torch.int32).long().clamp_(0, max(0, self.x.numel() - 1))


def _width(ratio: int) -> int:
    """Bits of an offset inside a chunk of `ratio` elements."""
    return max(1, (ratio - 1).bit_length())
