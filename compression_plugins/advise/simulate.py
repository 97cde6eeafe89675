"""A clock for the compute thread of one rank and one for its wire."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from .network import Network
from .work import Operation, Work, sent_bytes

Host = Literal["horovod", "ddp", "deepspeed"]
FUSION_BYTES = 128 << 20  # Horovod's HOROVOD_FUSION_THRESHOLD
_FUSABLE = ("all_reduce", "all_gather")


@dataclass(frozen=True)
class Machine:
    """What a step needs to know of a rank's machine.

    Attributes:
        copy_rate: bytes per second, read plus written, of a plain copy.
        steal: part of the CPU time of communication that is taken from scheme code: 1 where a rank has one core, 0
            where cores are idle or an accelerator runs it.
        computes: the computation is on the same cores, and loses as much.
    """

    copy_rate: float = 20e9
    steal: float = 0.0
    computes: bool = True


@dataclass(eq=False)
class Transfer:
    """An operation given to the wire at time `at`; `done` is known once it has started."""

    kind: str
    nbytes: float
    at: float
    repeat: int = 1
    done: float | None = None


@dataclass
class Wire:
    """Serves transfers one after the other."""

    network: Network
    host: Host
    copy_rate: float
    free: float = 0.0
    busy_s: float = 0.0
    cpu_share: float = 0.0
    _queue: list[Transfer] = field(default_factory=list)

    def post(self, kind: str, nbytes: float, at: float, repeat: int = 1) -> Transfer:
        """Hand in `repeat` collectives of `nbytes` each at time `at`, in seconds."""
        transfer = Transfer(kind, nbytes, at, repeat)
        self._queue.append(transfer)
        self.settle(at)
        return transfer

    def settle(self, now: float) -> None:
        """Start what can start until `now`."""
        while self._queue and max(self.free, self._queue[0].at) <= now:
            begin = max(self.free, self._queue[0].at)
            end = self._cycle(begin) if self.host == "horovod" else self._single(begin)
            self.busy_s += end - begin
            self.free = end

    def next_start(self) -> float:
        """When the next transfer in the queue can begin, in seconds."""
        return max(self.free, self._queue[0].at)

    def _single(self, begin: float) -> float:
        transfer = self._queue.pop(0)
        latency, busy = self.network.cost(transfer.kind, transfer.nbytes)
        transfer.done = max(begin, transfer.at + latency) + transfer.repeat * busy + (transfer.repeat - 1) * latency
        self._use([transfer], begin, transfer.done)
        return transfer.done

    def _cycle(self, begin: float) -> float:
        """Horovod's thread agrees with the others on all that is there, then runs it, fused where that is possible."""
        batch = [transfer for transfer in self._queue if transfer.at <= begin]
        self._queue = [transfer for transfer in self._queue if transfer.at > begin]
        now = begin + max(self.network.cost(t.kind, t.nbytes).latency_s for t in batch)
        for group in _fuse(batch):
            nbytes = sum(transfer.nbytes for transfer in group)
            latency, busy = self.network.cost(group[0].kind, nbytes)
            repeat = group[0].repeat
            now += repeat * busy + (repeat - 1) * latency
            if len(group) > 1:  # into the fusion buffer and out again
                now += 2 * 2 * nbytes / self.copy_rate
            for transfer in group:
                transfer.done = now
        self._use(batch, begin, now)
        return now

    def _use(self, batch: list[Transfer], begin: float, end: float) -> None:
        sent = sum(t.repeat * sent_bytes(t.kind, t.nbytes, self.network.size) for t in batch)
        self.cpu_share = min(0.9, self.network.cpu_s_per_byte * sent / max(1e-12, end - begin))


def _fuse(batch: list[Transfer]) -> list[list[Transfer]]:
    groups: list[list[Transfer]] = []
    open_: dict[str, list[Transfer]] = {}
    for transfer in batch:
        group = open_.get(transfer.kind)
        full = group is not None and sum(t.nbytes for t in group) + transfer.nbytes > FUSION_BYTES
        if group is None or full or transfer.kind not in _FUSABLE:
            group = open_[transfer.kind] = []
            groups.append(group)
        group.append(transfer)
    return groups


class Run:
    """The compute thread of one rank. `now` is its clock."""

    def __init__(self, network: Network, host: Host, machine: Machine) -> None:
        self.machine = machine
        self.wire = Wire(network, host, machine.copy_rate)
        self.now = self.backward_s = self.codec_s = 0.0

    def compute(self, seconds: float) -> None:
        """The model computes for so long."""
        self._work(seconds, self.machine.steal if self.machine.computes else 0.0)

    def _work(self, seconds: float, steal: float) -> None:
        """What takes `seconds` alone, and longer while the wire takes CPU time."""
        while seconds > 1e-12:
            self.wire.settle(self.now)
            if self.now >= self.wire.free:
                self.now += seconds
                return
            rate = 1 - steal * self.wire.cpu_share
            span = min(seconds / rate, self.wire.free - self.now)
            # Not `+= span`, which rounding could leave short of the moment for ever.
            self.now = self.wire.free if span < seconds / rate else self.now + span
            seconds -= span * rate

    def code(self, seconds: float) -> None:
        """A scheme's code, or a copy, runs for so long."""
        self.codec_s += seconds
        self._work(seconds, self.machine.steal)

    def post(self, kind: str, nbytes: float, repeat: int = 1) -> Transfer:
        """Start an operation, which takes the thread a moment."""
        self._work(repeat * self.wire.network.post_s, self.machine.steal)
        return self.wire.post(kind, nbytes, self.now, repeat)

    def finish_backward(self, seconds: float) -> None:
        """The rest of a backward pass that takes `seconds` in all."""
        self.compute(seconds - self.backward_s)

    def finished(self, transfer: Transfer) -> bool:
        """Whether it is done by now."""
        self.wire.settle(self.now)
        return transfer.done is not None and transfer.done <= self.now

    def wait(self, transfer: Transfer) -> None:
        """Let time pass until it is done."""
        while transfer.done is None:
            self.wire.settle(self.wire.next_start())
        self.now = max(self.now, transfer.done)


class Job:
    """A bucket on its way, as `engine.driver.Work` is one."""

    def __init__(self, run: Run, work: Work) -> None:
        self._run, self._work = run, work
        self._transfer: Transfer | None = None
        self.phase, self.done = 0, False
        self._next()

    def poll(self) -> None:
        while self._transfer is not None and self._run.finished(self._transfer):
            self._next()

    def advance(self) -> None:
        """Wait for the operation in flight and start the next."""
        if self._transfer is not None:
            self._run.wait(self._transfer)
            self._next()

    def _next(self) -> None:
        if self.phase < len(self._work.operations):
            op: Operation = self._work.operations[self.phase]
            self._run.code(op.repeat * op.code_s)
            self._transfer = self._run.post(op.kind, op.nbytes, op.repeat)
            self.phase += 1
        else:
            self._run.code(self._work.after_s)
            self._transfer, self.done = None, True
