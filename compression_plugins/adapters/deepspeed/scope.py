"""What is said of a reduction before it happens: which pieces of which parameters lie in its buffers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from ...errors import UnsupportedError

if TYPE_CHECKING:
    from torch import Tensor


class Reduces(Protocol):
    """The session of a scope, as the backend sees it."""

    group: Any

    def reduce(self, scope: Scope, tensor: Tensor, op: Any, group: Any, destination: int | None) -> bool:
        """Replace `tensor` by its sum over ranks. False: not a gradient's sum, the backend's turn."""
        ...


class Gathers(Protocol):
    """Weights of which partitions travel, as the backend and the session see them."""

    def gather(self, output: Tensor, mine: Tensor) -> bool:
        """Fill `output` with every rank's partition; `mine` is this rank's. False: the backend's turn."""
        ...

    def begin_step(self) -> None:
        """The optimizer is about to step."""
        ...

    def wire_bytes(self) -> float | None:
        """Bytes that a rank sends per step; None where that depends on the values."""
        ...

    def dense_bytes(self) -> float:
        """The same where they travel as they are."""
        ...

    def make_exact(self) -> None:
        """Gather exact weights now."""
        ...

    def resume(self) -> None:
        """The master weights are loaded."""
        ...


class Fetched(Protocol):
    """Parameters that are fetched for every pass, as the session sees them."""

    def fetch_bytes(self) -> tuple[float, float]:
        """Bytes that a rank sends when every parameter is fetched once, the mean over ranks; coded, and as they are."""
        ...

    def before_backward(self) -> None:
        """Gradients are about to be computed."""
        ...


class Piece(NamedTuple):
    """`numel` elements of parameter `name` from `start`; `owner` is the rank that needs them, None when all do."""

    name: str
    start: int
    numel: int
    owner: int | None = None


class Layout(NamedTuple):
    """What lies in the buffers of one reduction, in order. `key` identifies it; equal keys mean equal pieces."""

    key: tuple[Any, ...]
    pieces: tuple[Piece, ...]

    def take(self, start: int, numel: int) -> list[Piece]:
        """The pieces that make up elements [start, start + numel) of the buffers, laid end to end.

        Raises:
            UnsupportedError: a piece is cut.
        """
        pieces, position = [], 0
        for piece in self.pieces:
            if start <= position < start + numel:
                pieces.append(piece)
            position += piece.numel
        if sum(piece.numel for piece in pieces) != numel:
            raise mismatch(f"a buffer of {numel} elements is not made of the pieces announced for it")
        return pieces


class Scope:
    """One reduction of gradients in progress.

    Attributes:
        session: whose.
        layout: the pieces of all the buffers that will be reduced inside.
        unit: factor from a buffer to this rank's own gradient; DeepSpeed may have divided by the world size.
        taken: elements of the layout that collectives have consumed so far.
    """

    def __init__(self, session: Reduces, layout: Layout, unit: float) -> None:
        self.session, self.layout, self.unit, self.taken = session, layout, unit, 0

    def check(self) -> None:
        """Raise `UnsupportedError` if the host did not reduce exactly what it had announced."""
        announced = sum(piece.numel for piece in self.layout.pieces)
        if self.taken != announced:
            raise mismatch(f"{announced} gradient elements were announced, {self.taken} were reduced")


def mismatch(what: str) -> UnsupportedError:
    """The error for a host that does not do what the seam says."""
    import deepspeed

    return UnsupportedError(
        f"communication_compression: DeepSpeed {deepspeed.__version__} does not reduce gradients the way this "
        f"adapter knows: {what}. Install a tested version (pip install deepspeed==0.19.8) or remove the block"
    )
