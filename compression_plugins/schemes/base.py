"""What a scheme is: a frozen description, and a generator that reduces one bucket."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, TypeVar

from pydantic import BaseModel, ConfigDict

from ..memories import Memory

if TYPE_CHECKING:
    from torch import Tensor

    from ..codecs import Codec
    from ..transports.base import Handle, Transport
    from ..triton_kernels import Key

T = TypeVar("T")
#: Yields handles, is sent their results, and returns a T.
Phases = Generator["Handle", Any, T]
#: ... and returns the average.
Reduction = Phases["Tensor"]


class Segment(NamedTuple):
    """A piece of a parameter inside a bucket: `numel` elements from `start`; `shape` when it is the whole parameter."""

    name: str
    start: int
    numel: int
    shape: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Call:
    """All that a scheme may know while it reduces one bucket once.

    Attributes:
        transport: the ranks that take part; its operations are named after this bucket.
        key: random key of (seed, bucket, step, rank); `stream` separates draws within the call.
        step: optimizer steps done before this one, the same on every rank and after a resume.
        compressed_step: the same without the dense steps of the warm-up.
        segments: the tensors in the bucket, in order.
        shards: None for an all-reduce; for a reduce-scatter the number of elements that each rank owns, in rank order.
        residual: fp32 [numel], this rank's memory of the bucket; zeros at first. Only for a scheme that has a memory.
        state: `state(slot, name, make)` is a tensor that lives across steps, made by `make()` at first.
        vector: `vector(slot)` is fp32 [numel], a memory of the bucket beside the residual; zeros at first.
    """

    transport: Transport
    key: Key
    step: int
    compressed_step: int
    segments: Sequence[Segment]
    shards: Sequence[int] | None
    residual: Callable[[], Tensor]
    state: Callable[[str, str, Callable[[], Tensor]], Tensor]
    vector: Callable[[str], Tensor]


class Scheme(BaseModel):
    """Base of all schemes. Fields are the parameters that a configuration may set.

    A scheme made of parts names a `codec`, a `memory` and a `collective`; one that does more overrides `reduce`.

    Attributes:
        name: the word that selects it.
        paper: authors, year, arXiv id.
        memory: law of the residual, or None.
        sums_only: every operation is an all-reduce, so ranks that have left (`hvd.join`) may add zeros.
        host_dense: nothing is compressed; a host keeps its own path.
        trains: False for what only measures time.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    name: ClassVar[str]
    paper: ClassVar[str]
    sums_only: ClassVar[bool] = False
    host_dense: ClassVar[bool] = False
    trains: ClassVar[bool] = True

    @property
    def memory(self) -> Memory | None:
        return None

    @property
    def dense(self) -> Scheme:
        """What averages exempt tensors, and all tensors during the warm-up."""
        from .none import NoCompression

        return NoCompression()

    def check_ranks(self, size: int) -> None:
        """Called at start-up; raises `UnsupportedError`, with the nearest valid choice, if `size` ranks are wrong."""

    @property
    def codec(self) -> Codec:
        raise NotImplementedError(f"scheme {self.name} names no codec and must override reduce()")

    @property
    def collective(self) -> Callable[[Codec, Memory | None, Call, Tensor], Reduction]:
        """A codec that is unbiased, or so fine that rounding twice is harmless, may meet in two stages."""
        from ..collectives import gather, two_stage

        return gather if self.memory else two_stage

    def reduce(self, x: Tensor, call: Call) -> Reduction:
        """Average flat fp32 `x` over ranks (with `call.shards`, only this rank's shard of the result has meaning).

        `x` may be overwritten, and may be what is returned.
        """
        return (yield from self.collective(self.codec, self.memory, call, x))

    def wire_bits(self, segments: Sequence[Segment], size: int) -> float:
        """Bits that each of `size` ranks sends, the mean over ranks and steps, to reduce a bucket of `segments`
        once.
        """
        from ..collectives import even_shards, gather, in_one_round

        codec, numel = self.codec, total(segments)
        if self.collective is gather or in_one_round(codec.nbytes(numel), size):
            return (size - 1) * codec.payload_bits(numel)
        shards = [codec.payload_bits(n) for n in even_shards(numel, size, codec.block)]
        return sum(shards) * (size - 1) / size + (size - 1) * max(shards)


def total(segments: Sequence[Segment]) -> int:
    """Elements in a bucket."""
    return sum(segment.numel for segment in segments)
