"""Runs programs: generators that yield operations of a transport, are sent their results, and return something."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from .._lazy import torch
from ..core.call import Program
from ..core.seconds import Seconds
from ..errors import CompressionError
from ..transports.base import Handle

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")
#: Programs started after one before the driver waits for its operation, where order is a contract between ranks.
#: With one fewer, a wait would leave nothing on the network; every further one delays the second operations.
_LAG = 2


def _range(phase: str) -> AbstractContextManager[Any]:
    """A range of `torch.profiler`, compression.encode, .decode or .wait, where one is recording."""
    if torch.autograd._profiler_enabled():
        return torch.profiler.record_function(f"compression.{phase}")
    return nullcontext()


class Work(Generic[T]):
    """A program on its way.

    Attributes:
        done: it has returned, or was aborted.
        phase: operations that it has started.
    """

    def __init__(self, engine: Engine, program: Program[T]) -> None:
        self._engine, self._program = engine, program
        self._handle: Handle | None = None
        self._result: T | None = None
        self._callbacks: list[Callable[[T], None]] = []
        self.done = self.aborted = False
        self.phase = 0
        self._send(None)

    def poll(self) -> bool:
        """Go as far as possible without blocking; True when the result is there. Where order is a contract between
        ranks, only look: what is ready differs from rank to rank.
        """
        while not (self.done or self._engine.ordered) and self._handle.poll():  # type: ignore[union-attr]
            self.advance()
        return self.done

    def advance(self) -> None:
        """Block until the operation in flight is done, and start the next."""
        if self.done:
            return
        try:
            with _range("wait"), self._engine.seconds.spent("exposed"):
                value = self._handle.wait()  # type: ignore[union-attr]
        except BaseException:
            self.abort()
            raise
        self._engine.seconds.landed()
        self._send(value)

    def result(self) -> T:
        """What the program returns; waits for it, together with everything else that the driver runs.

        Raises:
            CompressionError: the program was aborted.
        """
        if not self.done:
            self._engine.drain()
        if self.aborted:
            raise CompressionError("this reduction was aborted")
        return self._result  # type: ignore[return-value]

    def then(self, callback: Callable[[T], None]) -> None:
        """Call `callback` with the result as soon as it is there; now, if it is."""
        if self.done and not self.aborted:
            callback(self._result)  # type: ignore[arg-type]
        else:
            self._callbacks.append(callback)

    def abort(self) -> None:
        """Give up: the program cleans up behind itself, and there will be no result."""
        if not self.done:
            self._handle, self.done, self.aborted = None, True, True
            self._engine.seconds.landed()
            self._program.close()

    def _send(self, value: Tensor | None) -> None:
        what = "decode" if self.phase else "encode"
        with _range(what), self._engine.seconds.spent(what):
            try:
                self._handle = self._program.send(value)
            except StopIteration as stop:
                self._result, self._handle, self.done = stop.value, None, True
            except BaseException:
                self._handle, self.done, self.aborted = None, True, True
                raise
        if self.done:
            for callback in self._callbacks:
                callback(self._result)  # type: ignore[arg-type]
            self._callbacks.clear()
            return
        self.phase += 1
        self._engine.seconds.launched()


class Engine:
    """Runs the programs of one rank over one transport.

    The first operation of a program leaves when the program is started. Where ranks find each other's operations by
    name, a further one leaves as soon as the one before has landed (`progress`). Where ranks must issue operations in
    one order, it leaves only at points that all ranks share: when a later program is started, and in `drain`.

    Args:
        ordered: whether order is a contract between ranks (`Transport.ordered`).

    Attributes:
        seconds: where its time went.
    """

    def __init__(self, ordered: bool) -> None:
        self.ordered = ordered
        self.seconds = Seconds()
        self._works: list[Work[Any]] = []
        self._recent: deque[Work[Any]] = deque(maxlen=_LAG)

    def run(self, program: Program[T]) -> Work[T]:
        """Start `program`. Where the transport is ordered, every rank must start the same ones in the same order."""
        if self.ordered and len(self._recent) == _LAG:
            for work in self._works:
                if work not in self._recent:
                    work.advance()
        work = Work(self, program)
        self._recent.append(work)
        self._works = [other for other in self._works if not other.done]
        if not work.done:
            self._works.append(work)
        return work

    def progress(self) -> None:
        """Advance what is ready, without blocking. Where order is a contract between ranks, nothing happens."""
        if not self.ordered:
            self._works = [work for work in self._works if not work.poll()]

    def drain(self) -> None:
        """Finish everything, level by level: nobody waits for a second operation while a first one is outstanding.

        One by one would deadlock where ranks hold their programs in different orders.
        """
        while self._works:
            level = min(work.phase for work in self._works)
            for work in self._works:
                if work.phase == level:
                    work.advance()
            self._works = [work for work in self._works if not work.done]
        self._recent.clear()

    def settle(self) -> None:
        """Let go of what is done, whoever saw to it."""
        self._works = [work for work in self._works if not work.done]
        self._recent.clear()

    def abort(self) -> None:
        """Give up all that is in flight, after an error or a rollback of the host."""
        for work in self._works:
            work.abort()
        self._works = []
        self._recent.clear()
