"""What a scheme is given to reduce one bucket once, and the generator that it answers with."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol, TypeVar

from .clock import Clock

if TYPE_CHECKING:
    from torch import Tensor

    from ..transports.base import Handle, Transport
    from ..triton_kernels import Key
    from .memory import Vector

T = TypeVar("T")
#: A program: yields handles of a transport, is sent their results, and returns a T.
Program = Generator["Handle", Any, T]
#: ... and returns the average.
Reduction = Program["Tensor"]
#: What travels. It is part of the name of all state, so that a parameter's gradient and its weights never share any.
Role = Literal["gradient", "parameter", "update", "activation"]


class Segment(NamedTuple):
    """A piece of a parameter inside a bucket.

    Attributes:
        name: of the parameter.
        start, numel: the elements [start, start + numel) of the flattened parameter.
        shape: of the parameter, when the piece is the whole of it.
        row: elements of a row of the parameter, all dimensions but the first; 0 when it has fewer than two dimensions.
    """

    name: str
    start: int
    numel: int
    shape: tuple[int, ...] | None = None
    row: int = 0


class Slots(Protocol):
    """The state of one bucket, kept by parameter name and offset from step to step.

    A step that is thrown away leaves no trace: what is changed here counts only when the step is committed.
    """

    def vector(self, slot: str, peer: int | None = None) -> Tensor:
        """fp32 [numel], zeros at first, to be updated in place; `peer` tells vectors of several ranks apart."""
        ...

    def exchange(self, slot: str, peer: int | None = None) -> Vector:
        """The same vector before and after this reduction, for code that reads one and writes all of the other: it
        saves the copy that `vector` makes.
        """
        ...

    def tensor(self, slot: str, name: str, make: Callable[[], Tensor]) -> Tensor:
        """The tensor of any shape and dtype called `slot` of parameter `name`, to be updated in place; `make()` gives
        its first value.
        """
        ...


@dataclass(frozen=True)
class Call:
    """All that a scheme may know while it reduces one bucket once.

    Attributes:
        transport: the ranks that take part; its operations are named after this bucket.
        key: random key of this rank's own message; `core.streams.of` gives those of other draws in the reduction.
        clock: when this happens.
        segments: the tensors in the bucket, in order.
        shards: None for an all-reduce; for a reduce-scatter the number of elements that each rank owns, in rank order.
        state: what the scheme remembers of this bucket.
        role: what the bucket holds.
        absent: names of parameters for which this rank has nothing to say in this step: their values are zero, and what
            the rank remembers of them is left as it is.
        weights: gives the parameters of the bucket, a new flat fp32 vector in the order of `segments`; None where the
            host does not show them.
    """

    transport: Transport
    key: Key
    clock: Clock
    segments: Sequence[Segment]
    shards: Sequence[int] | None
    state: Slots
    role: Role = "gradient"
    absent: frozenset[str] = frozenset()
    weights: Callable[[], Tensor] | None = None

    def residual(self) -> Vector:
        """This rank's residual, fp32, one value for each element of the bucket: `old` before this reduction and `new`
        after it. Write every element of `new`; `old` is only read, unless both are one tensor.
        """
        return self.state.exchange("residual")


def total(segments: Sequence[Segment]) -> int:
    """Number of elements of all `segments`, which are those of a bucket."""
    return sum(segment.numel for segment in segments)
