"""ScaleCom: sparsification whose traffic does not grow with the number of workers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from .. import triton_kernels as K
from .._lazy import torch
from ..codecs.chunks import chunk_add, chunk_scatter, place_bits
from ..codecs.largest import largest
from ..collectives import dense_mean, half_mean, half_mean_bits, half_scatter, shared_index
from ..core.call import Call, Reduction, Segment, total
from ..core.memory import Memory, Vector, finite
from .base import Operation, Scheme
from .registry import register

if TYPE_CHECKING:
    from torch import Tensor


@register
class ScaleCom(Scheme):
    """Cyclic local top-k (CLT-k): in each round one rank, in turn, chooses the coordinates for all.

    The leader of round t is rank t mod n. `selection: chunk` keeps the largest of every `ratio` neighbours, in one
    pass; `exact` the k largest of the bucket. A low-pass filter damps the residual: m <- (1 - beta) m + beta (p -
    sent), here as p = g + beta r and r <- r + g - sent with r = m / beta, which is the same recursion.

    Wire: places from the leader, ceil(log2 ratio) bits per chunk (at least 1; `exact`: 32 bits per value), then an
    all-reduce of the kept values. `values: fp16` and `bf16` halve the latter: ranks still add in fp32, and what the
    rounding takes away goes to the residual (`half_mean`), so `sent` above is the rounded value.

    In a reduce-scatter chunks begin anew with each shard, and the kept values go to the owners of their shards only.
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

    @property
    def operations(self) -> frozenset[Operation]:
        return frozenset(("mean", "scatter_mean"))

    def scatter_mean(self, x: Tensor, call: Call) -> Reduction:
        shards, transport = list(call.shards or ()), call.transport
        selector = _Shards([self._choice(part, vector) for part, vector in _cut(x, call.residual(), shards)])
        leader = call.clock.round % transport.size
        places, values = yield from shared_index(
            transport, leader, selector.select, selector.gather, selector.placeholder
        )
        kept = [-(-n // self.ratio) for n in shards]
        if self.values == "fp32":
            mean = (yield transport.reduce_scatter(values, kept)).div_(transport.size)
        else:
            mean, lost = yield from half_scatter(call, values, kept, self.values)
            selector.remember(places, lost)
        if shards[transport.rank]:
            selector.scatter(places, mean, sum(1 for n in shards[: transport.rank] if n))
        return x

    def _choice(self, x: Tensor, residual: Vector) -> _Chunks | _Exact:
        choice = _Chunks if self.selection == "chunk" else _Exact
        return choice(x, self.ratio, Memory(alpha=self.beta), residual)

    def mean(self, x: Tensor, call: Call) -> Reduction:
        leader = call.clock.round % call.transport.size
        selector = self._choice(x, call.residual())
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
        kept, around = -(-total(segments) // self.ratio), (size - 1) / size
        values = 64 * kept * around if self.values == "fp32" else half_mean_bits(kept, size, self.values)
        return self._index_bits(kept) * around + values

    def scatter_bits(self, segments: Sequence[Segment], size: int) -> float:
        kept = -(-total(segments) // self.ratio)
        value_bits = 32 if self.values == "fp32" else 16
        return (self._index_bits(kept) + value_bits * kept) * (size - 1) / size

    def _index_bits(self, kept: int) -> int:
        return 32 * -(-kept * place_bits(self.ratio) // 32) if self.selection == "chunk" else 32 * kept


def _cut(x: Tensor, residual: Vector, shards: Sequence[int]) -> Iterator[tuple[Tensor, Vector]]:
    """The shards that are not empty, of `x` and of `residual`."""
    start = 0
    for part in x.split(list(shards)):
        if part.numel():
            yield part, residual.part(start, start + part.numel())
        start += part.numel()


class _Chunks:
    """One value out of every `ratio` neighbours; places are offsets inside the chunk."""

    def __init__(self, x: Tensor, ratio: int, memory: Memory, residual: Vector) -> None:
        self.x, self.ratio, self.residual, self.kept = x, ratio, residual, -(-x.numel() // ratio)
        self.arguments = memory.kernel_arguments(residual)

    def select(self) -> tuple[Tensor, Tensor]:
        indices, values = K.chunk_select(self.x, self.ratio, **self.arguments)
        return K.pack_bits(indices, place_bits(self.ratio)), values

    def gather(self, payload: Tensor) -> Tensor:
        return K.chunk_gather(self.x, self._unpack(payload), self.ratio, **self.arguments)

    def placeholder(self) -> Tensor:
        nbytes = 4 * -(-self.kept * place_bits(self.ratio) // 32)
        return torch.empty(nbytes, dtype=torch.uint8, device=self.x.device)

    def remember(self, payload: Tensor, lost: Tensor) -> None:
        chunk_add(self._unpack(payload), lost, self.ratio, self.residual.new)

    def scatter(self, payload: Tensor, values: Tensor) -> Tensor:
        return chunk_scatter(self._unpack(payload), values, self.ratio, self.x)

    def _unpack(self, payload: Tensor) -> Tensor:
        return K.unpack_bits(payload, self.kept, place_bits(self.ratio))


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


class _Shards:
    """A choice for each shard, as one."""

    def __init__(self, choices: list[_Chunks | _Exact]) -> None:
        self._choices = choices
        self._lengths = [choice.placeholder().numel() for choice in choices]

    def select(self) -> tuple[Tensor, Tensor]:
        chosen = [choice.select() for choice in self._choices]
        return torch.cat([places for places, _ in chosen]), torch.cat([values for _, values in chosen])

    def gather(self, payload: Tensor) -> Tensor:
        return torch.cat([choice.gather(part) for choice, part in self._with(payload)])

    def placeholder(self) -> Tensor:
        return torch.cat([choice.placeholder() for choice in self._choices])

    def remember(self, payload: Tensor, lost: Tensor) -> None:
        parts = lost.split([choice.kept for choice in self._choices])
        for (choice, places), part in zip(self._with(payload), parts):
            choice.remember(places, part)

    def scatter(self, payload: Tensor, values: Tensor, number: int) -> Tensor:
        """In the shard of that number."""
        choice, places = self._with(payload)[number]
        return choice.scatter(places, values)

    def _with(self, payload: Tensor) -> list[tuple[_Chunks | _Exact, Tensor]]:
        return list(zip(self._choices, payload.split(self._lengths)))
