"""The deterministic mode: the same server and workers in one process, and a list that says whose gradient comes next.

Messages pass through the wire format, so bits and rounding are those of real processes. A run of processes whose order
of arrivals is replayed here (`arrivals=server.arrivals`) ends with the same bits, if no worker left or came back.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

from . import messages
from .messages import HEADER, Kind, Message, parse_header
from .server import Server
from .worker import Worker


class Simulation:
    """Runs `server` with `workers` until the server is done.

    Args:
        workers: of ranks 0 .. M-1.
        delays: asked-for t - D(t) of update t, cyclic. The arriving gradient is that of the worker whose staleness is
            nearest, the lowest rank among equals; what was realised is in `server.delays`. Default: round robin.
        arrivals: instead, the rank whose gradient arrives next, one an update.
        on_update: called after every message that made updates, with the server; for studies of the iterates.
    """

    def __init__(
        self,
        server: Server,
        workers: Sequence[Worker],
        delays: Sequence[int] | None = None,
        arrivals: Sequence[int] | None = None,
        on_update: Callable[[Server], None] | None = None,
    ) -> None:
        self.server, self.workers = server, {worker.rank: worker for worker in workers}
        self._delays, self._arrivals = delays, deque(arrivals) if arrivals is not None else None
        self._on_update = on_update
        self._answers: dict[int, deque[Message]] = {rank: deque() for rank in self.workers}

    def run(self) -> Server:
        """To the end; returns the server."""
        for rank in sorted(self.workers):
            self.server.join(rank)
        self.server.begin()
        while self.advance():
            pass
        return self.server

    def advance(self) -> bool:
        """One arrival at the server; False when the run is over."""
        self._deliver()
        rank = None if self.server.phase == "done" else self._next()
        if rank is None:
            return False
        step = self.server.step
        self.server.receive(rank, self._answers[rank].popleft())
        if self._on_update and self.server.step > step:
            self._on_update(self.server)
        return True

    def lose(self, rank: int, reason: str = "lost in the simulation") -> None:
        """The worker is gone, and so is what it was about to send."""
        self._answers[rank].clear()
        self.server.leave(rank, reason)

    def _deliver(self) -> None:
        while self.server.outbox:
            rank, message = self.server.outbox.popleft()
            worker = self.workers[rank]
            answer = worker.handle(self._through_the_wire(message, messages.DOWN))
            if answer is not None:
                self._answers[rank].append(self._through_the_wire(answer, messages.UP))

    def _through_the_wire(self, message: Message, accept: frozenset[Kind]) -> Message:
        server = self.server
        data = message.header()
        assert len(data) == HEADER.size
        return parse_header(data, accept, server.numel, server.options.workers, server.samples).message(message.payload)

    def _next(self) -> int | None:
        ready = [rank for rank in sorted(self._answers) if self._answers[rank]]
        for rank in ready:
            if self._answers[rank][0].kind is Kind.TOTAL:
                return rank
        if not ready:
            return None
        if self._arrivals is not None:
            return self._arrivals.popleft() if self._arrivals else ready[0]
        age = self.server.staleness()
        if self._delays:
            asked = self._delays[self.server.step % len(self._delays)]
            return min(ready, key=lambda rank: (abs(age[rank] - asked), rank))
        return min(ready, key=lambda rank: self._answers[rank][0].step)
