"""The server as a state machine: messages and departures in, messages out. It knows neither sockets nor time, so the
deterministic simulation and the real processes run the very same object.

Bounded delay. Every model that goes out has a ticket with the update count D at which x was read; its gradient must be
applied at an update t <= D + tau. An arriving gradient is applied at once if all other tickets can still keep their
deadlines, else it is held until the late ones have arrived; at most tau + 1 tickets are out. An epoch hands out exactly
`inner_steps` tickets, so no gradient belongs to an old snapshot, and between epochs nothing is in flight.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from torch import Tensor

from ..engine.saved import seal
from ..errors import CompressionError, MismatchError
from . import checkpoint, messages
from .algorithms import Prox, State, get
from .messages import Kind, Message, MessageError
from .options import Options
from .quantizer import Diverged
from .records import Epoch, Seconds, Tally, Traffic, keep

log = logging.getLogger("compression_plugins.parameter_server")
Phase = Literal["waiting", "snapshot", "inner", "done"]


@dataclass
class Ticket:
    """A model on its way to becoming an update; `zeta` once the gradient has arrived."""

    number: int
    version: int
    zeta: Tensor | None = None


class Server:
    """Owns x. Drive it with `join`, `begin`, `receive`, `leave`; send what is in `outbox`, in order.

    Args:
        options: of the run.
        x: fp32 [numel], where to start.
        samples: size of the data set (n).
        on_epoch: called after every snapshot with its `Epoch`.
        on_checkpoint: called with the server at the end of every epoch, when nothing is in flight.

    Attributes:
        step: updates applied so far (t); `epoch`: snapshots completed or, within one, begun before it.
        delays: t - D(t) of the latest updates of this process, between `records.KEPT` and twice as many once there are.
        arrivals: whose gradient arrived, in order, as many; with gradients held back not the order of updates.
        largest_delay: of all updates of this process.
        outbox: (rank, message) to send.
        traffic, seconds: messages counted; where this process's time went.
    """

    def __init__(
        self,
        options: Options,
        x: Tensor,
        samples: int,
        on_epoch: Callable[[Epoch], None] | None = None,
        on_checkpoint: Callable[[Server], None] | None = None,
    ) -> None:
        if options.workers > samples:
            raise CompressionError(f"{options.workers} workers for {samples} samples; every worker needs at least one")
        self.options, self.samples = options, samples
        self.on_epoch, self.on_checkpoint = on_epoch, on_checkpoint
        self.algorithm, self.prox = get(options.method), Prox(options.l1, options.l2)
        self.state = State.at(x, options.theta)
        self.numel, self.inner_steps = x.numel(), options.steps_an_epoch(samples)
        self.phase: Phase = "waiting"
        self.step = self.epoch = self.tickets = 0
        self.traffic, self.seconds = Traffic(), Seconds()
        self.history: list[Epoch] = []
        self.largest_delay = 0
        self.delays: list[int] = []
        self.arrivals: list[int] = []
        self.parts: dict[int, list[int]] = {}
        self.outbox: deque[tuple[int, Message]] = deque()
        self._out: dict[int, Ticket] = {}  # by worker, in order of arrival once the gradient is there
        self._idle: deque[int] = deque()
        self._issued = self._applied = 0  # of this epoch
        self._asked: dict[int, deque[tuple[int, ...]]] = {}
        self._totals: dict[tuple[int, ...], tuple[float, Tensor]] = {}
        self._tally = Tally()

    # --- workers come and go ---

    @property
    def active(self) -> list[int]:
        """The ranks that take part at the moment, sorted."""
        return sorted(self.parts)

    def join(self, rank: int) -> None:
        """A worker is connected, for the first time or again."""
        if not 0 <= rank < self.options.workers:
            raise MismatchError(f"a worker of rank {rank} where there are {self.options.workers}")
        if rank in self.parts:
            self.leave(rank, "connected again")
        self.parts[rank] = []
        if self.phase == "done":
            self._send(rank, messages.stop("the run is complete", error=False))
        elif self.phase != "waiting":
            log.info("worker %d joins at update %d", rank, self.step)
            self._send_snapshot(rank)
            self._share_out(claimed=rank)
            if self.phase == "inner":
                self._idle.append(rank)
                self._issue()
            else:
                self._ask()

    def leave(self, rank: int, reason: str) -> None:
        """A worker is gone: its ticket goes back, its parts go to the others."""
        if rank not in self.parts:
            return
        log.warning("worker %d dropped at update %d: %s", rank, self.step, reason)
        del self.parts[rank]
        self.outbox = deque(item for item in self.outbox if item[0] != rank)
        if self.phase in ("waiting", "done"):
            return
        if self._out.pop(rank, None) is not None:
            self._issued -= 1
        if rank in self._idle:
            self._idle.remove(rank)
        self._asked.pop(rank, None)
        self._share_out()
        if self.phase == "snapshot":
            self._ask()
        else:
            self._apply_what_can_be()

    def begin(self) -> None:
        """Take the first snapshot (or, after `load_state_dict`, the next) with the workers that have joined."""
        if self.phase != "waiting":
            raise CompressionError("the run has begun already")
        self._share_out()
        self._snapshot()

    def blockers(self) -> list[int]:
        """Workers that others wait for. Empty while nobody waits, however long a step takes."""
        if self.phase == "snapshot":
            late = [rank for rank in self._asked if self._asked[rank]]
            return late if len(late) < len(self.parts) else []
        if self.phase != "inner":
            return []
        late = [rank for rank, ticket in self._out.items() if ticket.zeta is None]
        if len(late) < len(self._out):  # gradients are held
            first = min((self._out[rank].version for rank in late), default=0)
            return [rank for rank in late if self._out[rank].version == first]
        return late if self._idle else []

    def samples_asked(self, rank: int) -> int:
        """Samples whose gradient sum is awaited from `rank`; 0 outside snapshots."""
        return sum(map(self._samples_in, self._asked.get(rank, ()))) if self.phase == "snapshot" else 0

    def _samples_in(self, parts: Sequence[int]) -> int:
        return sum(len(range(part, self.samples, self.options.workers)) for part in parts)

    def staleness(self) -> dict[int, int]:
        """t - D of every worker whose gradient has not arrived."""
        return {rank: self.step - ticket.version for rank, ticket in self._out.items() if ticket.zeta is None}

    # --- messages ---

    def receive(self, rank: int, message: Message) -> None:
        """Take a checked message of an active worker; raises `MessageError` for one that was not asked for."""
        if message.kind is Kind.TOTAL:
            self._receive_total(rank, message)
        else:
            self._receive_gradient(rank, message)

    def _receive_total(self, rank: int, message: Message) -> None:
        asked = self._asked.get(rank)
        if self.phase != "snapshot" or not asked or message.step != self.epoch:
            raise MessageError(f"worker {rank} sent a gradient sum that was not asked for")
        parts = asked[0]
        if message.count != self._samples_in(parts):
            raise MessageError(f"worker {rank} summed {message.count} samples, not those of parts {list(parts)}")
        total = self._vector(rank, message)
        asked.popleft()
        self.traffic.count(message)
        self._totals[parts] = message.value, total
        self._finish_snapshot()

    def _receive_gradient(self, rank: int, message: Message) -> None:
        ticket = self._out.get(rank)
        if ticket is None or ticket.zeta is not None or message.step != ticket.number:
            raise MessageError(f"worker {rank} sent a gradient that was not asked for (ticket {message.step})")
        ticket.zeta = self._vector(rank, message)
        keep(self.arrivals, rank)
        self.traffic.count(message)
        if message.kind in (Kind.INDICES, Kind.BITMAP):
            self._tally.survivors.add(message.count / self.numel)
        self._out[rank] = self._out.pop(rank)
        self._apply_what_can_be()

    def _vector(self, rank: int, message: Message) -> Tensor:
        try:
            with self.seconds.spent("coding"):
                return messages.vector(message, self.numel)
        except Diverged as error:
            raise Diverged(f"epoch {self.epoch}, update {self.step}, worker {rank}: {error}") from None

    def _send(self, rank: int, message: Message) -> None:
        self.traffic.count(message)
        self.outbox.append((rank, message))

    # --- the inner loop ---

    def _apply_what_can_be(self) -> None:
        while (rank := self._next_to_apply()) is not None:
            self._apply(rank)
        self._issue()
        if self._applied == self.inner_steps:
            self._end_epoch()

    def _next_to_apply(self) -> int | None:
        for rank, ticket in self._out.items():
            if ticket.zeta is not None and self._others_keep_their_deadlines(rank):
                return rank
        return None

    def _others_keep_their_deadlines(self, rank: int) -> bool:
        """If `rank`'s gradient becomes update t, the i-th of the others, earliest first, becomes t + 1 + i at best."""
        versions = sorted(ticket.version for other, ticket in self._out.items() if other != rank)
        return all(self.step + 1 + i <= version + self.options.tau for i, version in enumerate(versions))

    def _apply(self, rank: int) -> None:
        ticket = self._out.pop(rank)
        delay = self.step - ticket.version
        keep(self.delays, delay)
        self.largest_delay = max(self.largest_delay, delay)
        self._tally.delay = max(self._tally.delay, delay)
        assert ticket.zeta is not None
        with self.seconds.spent("computing"):
            self.algorithm.rule.update(self.state, ticket.zeta, self.options.lr, self.prox)
        self.step += 1
        self._applied += 1
        self._idle.append(rank)

    def _issue(self) -> None:
        while self._idle and self._issued < self.inner_steps and len(self._out) <= self.options.tau:
            rank = self._idle.popleft()
            with self.seconds.spent("coding"):
                message = self.algorithm.send_model(self.state, self.options.mu, self.options.seed, self.tickets, rank)
            self._out[rank] = Ticket(self.tickets, self.step)
            self._tally.widths.add(message.bits)
            self._issued += 1
            self.tickets += 1
            self._send(rank, message)

    def _end_epoch(self) -> None:
        self.algorithm.rule.end_epoch(self.state)
        self._finish_row()
        self.epoch += 1
        if self.epoch >= self.options.epochs:
            self.state.snapshot.copy_(self.state.x)
        if self.on_checkpoint:
            self.on_checkpoint(self)
        if self.epoch >= self.options.epochs:
            self.finish("the run is complete")
        else:
            self._snapshot()

    def _finish_row(self) -> None:
        row, tally = self.history[-1], self._tally
        row.model_bits = tally.widths.value() or 0.0
        row.survivors = tally.survivors.value()
        row.delay = tally.delay

    def finish(self, text: str, error: bool = False) -> None:
        """Tell every worker that the run is over."""
        if self.phase == "inner":
            self._finish_row()
        self.phase = "done"
        for rank in self.active:
            self._send(rank, messages.stop(text, error))

    # --- snapshots ---

    def _snapshot(self) -> None:
        self.phase = "snapshot"
        self._idle.clear()
        self._totals.clear()
        self._asked.clear()
        self._issued = self._applied = 0
        self._tally = Tally()
        self.state.snapshot.copy_(self.state.x)
        for rank in self.active:
            self._send_snapshot(rank)
        self._ask()

    def _send_snapshot(self, rank: int) -> None:
        with self.seconds.spent("coding"):
            message = messages.exact(Kind.SNAPSHOT, self.state.snapshot, self.epoch)
        self._send(rank, message)

    def _ask(self) -> None:
        """Ask for the gradient sums that are neither here nor on their way."""
        known = {part for parts in self._totals for part in parts}
        known |= {part for queue in self._asked.values() for parts in queue for part in parts}
        for rank in self.active:
            missing = [part for part in self.parts[rank] if part not in known]
            if missing:
                self._asked.setdefault(rank, deque()).append(tuple(missing))
                self._send(rank, messages.numbers(Kind.SUM, missing, self.epoch))

    def _finish_snapshot(self) -> None:
        if sum(map(len, self._totals)) < self.options.workers:
            return
        gradient = self.state.gradient.zero_()
        loss = 0.0
        with self.seconds.spent("computing"):
            for parts in sorted(self._totals):  # an order that arrivals do not change
                loss += self._totals[parts][0]
                gradient.add_(self._totals[parts][1])
            gradient.div_(self.samples)
            value = loss / self.samples + self.prox.value(self.state.snapshot)
        self._totals.clear()
        row = Epoch(self.epoch, self.step, value, float(gradient.norm()), self.traffic.bits, self.traffic.wire_bytes)
        self.history.append(row)
        if self.on_epoch:
            self.on_epoch(row)
        if self.options.target_loss is not None and value <= self.options.target_loss:
            self.finish(f"the target loss {self.options.target_loss:g} is reached")
            return
        self.phase = "inner"
        self.algorithm.rule.start_epoch(self.state)
        self._idle.extend(self.active)
        self._issue()

    def _share_out(self, claimed: int | None = None) -> None:
        """Give every part an owner: its own worker where active, else whoever has fewest. Tells those it concerns."""
        before = {rank: list(parts) for rank, parts in self.parts.items()}
        for rank in self.parts:
            self.parts[rank] = [part for part in before[rank] if part == rank or part not in self.parts]
        owned = {part for parts in self.parts.values() for part in parts}
        for part in range(self.options.workers):
            if part not in owned and self.parts:
                rank = part if part in self.parts else min(self.active, key=lambda r: (len(self.parts[r]), r))
                self.parts[rank].append(part)
        for rank in self.active:
            self.parts[rank].sort()
            if self.parts[rank] != before[rank] or rank == claimed:
                self._send(rank, messages.numbers(Kind.SHARD, self.parts[rank], self.epoch))

    # --- checkpoints ---

    def state_dict(self) -> dict[str, Any]:
        """At the end of an epoch: plain numbers and tensors; loads with `torch.load(..., weights_only=True)`."""
        if self._out or self.phase == "snapshot":
            raise CompressionError("the server's state can be saved between epochs only (on_checkpoint)")
        return seal({
            "version": checkpoint.VERSION,
            "digest": self.options.digest(self.numel, self.samples).hex(),
            "step": self.step,
            "epoch": self.epoch,
            "tickets": self.tickets,
            "x": self.state.x.clone(),
            "momentum": self.state.momentum.clone(),
            "theta": self.state.theta,
            "traffic": asdict(self.traffic),
            "history": [asdict(row) for row in self.history],
        })  # fmt: skip

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Continue, bit for bit, after the epoch that was saved; then `begin`.

        Raises:
            CompressionError: the state is damaged, of another version or another run, or has no epoch left to do.
        """
        contents = checkpoint.check(saved, self.numel)
        if contents.digest != self.options.digest(self.numel, self.samples).hex():
            raise MismatchError("the checkpoint is of a run with other options, another model or other data")
        if self.phase != "waiting":
            raise CompressionError("load a checkpoint before the run begins")
        if contents.epoch >= self.options.epochs:
            raise CompressionError(
                f"the checkpoint has done {contents.epoch} epochs of {self.options.epochs}: raise epochs"
            )
        self.step, self.epoch, self.tickets = contents.step, contents.epoch, contents.tickets
        self.state = State.at(saved["x"], contents.theta)
        self.state.momentum.copy_(saved["momentum"])
        self.traffic = Traffic(**contents.traffic.model_dump())
        self.history = [Epoch(**row.model_dump()) for row in contents.history]
