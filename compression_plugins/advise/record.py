"""The operations of a scheme with the seconds of code between them, as one rank of many runs it without a network."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch

from ..config import Config
from ..core.call import Segment
from ..engine.plan import Bucket
from ..engine.reducer import Reducer
from ..schemes.base import Scheme
from ..transports.base import Handle
from ..transports.echo import EchoTransport

if TYPE_CHECKING:
    from torch import Tensor


class Operation(NamedTuple):
    """`repeat` times: `code_s` seconds of scheme code, then a collective `kind` that is handed `nbytes` of payload."""

    code_s: float
    kind: str
    nbytes: float
    repeat: int = 1


@dataclass(frozen=True)
class Work:
    """One rank's part in the reduction of one bucket.

    Attributes:
        operations: in order; each starts when the one before is done.
        after_s: code after the last one.
        share: of all steps, between 0 and 1; a scheme may have two kinds of steps.
    """

    operations: tuple[Operation, ...]
    after_s: float
    share: float = 1.0

    @property
    def code_s(self) -> float:
        return sum(op.repeat * op.code_s for op in self.operations) + self.after_s

    def sent(self, size: int) -> float:
        """Bytes that each of `size` ranks sends, the mean over ranks."""
        return sum(op.repeat * sent_bytes(op.kind, op.nbytes, size) for op in self.operations)


def sent_bytes(kind: str, nbytes: float, size: int) -> float:
    """Bytes that one rank sends in a collective on `nbytes` of payload, the mean over ranks; as `Transport.sent`."""
    return {
        "all_reduce": 2 * (size - 1) / size * nbytes,
        "all_gather": (size - 1) * nbytes,
        "all_to_all": (size - 1) / size * nbytes,
        "broadcast": (size - 1) / size * nbytes,
        "exchange": nbytes if size > 1 else 0.0,
    }[kind]


class _TooLarge(Exception):
    """An all-gather whose result would not fit; all before it is recorded."""


class RecordingTransport(EchoTransport):
    """Notes the seconds between operations, without those that the echo itself takes.

    Args:
        clock: seconds, after the device has finished what it was given.
        limit: bytes that an all-gather may return; more raises.
    """

    def __init__(self, rank: int, size: int, clock: Callable[[], float], limit: float = float("inf")) -> None:
        super().__init__(rank, size)
        self._clock, self._limit = clock, limit
        self.operations: list[Operation] = []
        self._since = 0.0

    def begin(self) -> None:
        """Forget what was recorded, and start the clock."""
        self.operations = []
        self._since = self._clock()

    def end(self) -> Work:
        """What was recorded since `begin`."""
        return Work(tuple(self.operations), self._clock() - self._since)

    def _note(self, kind: str, x: Tensor, run: Callable[[], Handle]) -> Handle:
        nbytes = x.numel() * x.element_size()
        self.operations.append(Operation(self._clock() - self._since, kind, nbytes))
        if kind == "all_gather" and nbytes * self.size > self._limit:
            raise _TooLarge
        handle = run()
        self._since = self._clock()
        return handle

    def all_reduce(self, x: Tensor) -> Handle:
        return self._note("all_reduce", x, lambda: super(RecordingTransport, self).all_reduce(x))

    def all_gather(self, x: Tensor) -> Handle:
        return self._note("all_gather", x, lambda: super(RecordingTransport, self).all_gather(x))

    def all_to_all(self, x: Tensor, send: Sequence[int], receive: Sequence[int]) -> Handle:
        return self._note("all_to_all", x, lambda: super(RecordingTransport, self).all_to_all(x, send, receive))

    def broadcast(self, x: Tensor, root: int) -> Handle:
        return self._note("broadcast", x, lambda: super(RecordingTransport, self).broadcast(x, root))

    def send_recv(self, x: Tensor, to: int, source: int, receive: int | None = None) -> Handle:
        return self._note("exchange", x, lambda: super(RecordingTransport, self).send_recv(x, to, source, receive))


class Trace(NamedTuple):
    """Reductions of one bucket by one rank: the first step of a period, and any other."""

    first: Work
    other: Work


def record(
    scheme: Scheme,
    segments: Sequence[Segment],
    size: int,
    rank: int,
    device: str,
    steps: int,
    limit: float = float("inf"),
) -> Trace:
    """Run `scheme` as rank `rank` of `size`, and keep medians over `steps` steps.

    Step 0 is one kind: there schemes of a period do what they seldom do. The others are steps 1 + 2 i * size: rank 1
    then leads and the others follow, where ranks take turns; and they are odd, for now and then is rarely odd. With
    `steps` 0 only the operations have a meaning.
    """
    transport = RecordingTransport(rank, size, clock(device), limit)
    reducer = Reducer(_config(scheme), transport)
    bucket = Bucket(scheme, tuple(segments), device)
    generator = torch.Generator().manual_seed(rank)
    gradient = torch.randn(bucket.numel, generator=generator).to(device)
    flat = torch.empty_like(gradient)

    def one(step: int) -> Work:
        flat.copy_(gradient)
        reducer.step = step
        transport.begin()
        try:
            reducer.reduce(bucket, flat)
        except _TooLarge:
            reducer.abort()
            return Work(tuple(transport.operations), 0.0)
        work = transport.end()
        reducer.end_step()
        return work

    works = one(0), one(1 + 2 * size)  # both kinds are compiled and have their state
    if steps == 0:
        return Trace(*(_median([work]) for work in works))
    others = [one(1 + 2 * i * size) for i in range(1, steps + 1)]
    firsts = [one(0) for _ in range(max(1, steps // 2))]
    return Trace(_median(firsts), _median(others))


def _median(works: list[Work]) -> Work:
    """Stretch by stretch; equal operations in a row become one."""
    after = statistics.median(work.after_s for work in works)
    codes = [statistics.median(times) for times in zip(*([op.code_s for op in work.operations] for work in works))]
    merged: list[Operation] = []
    for op, code_s in zip(works[0].operations, codes):
        last = merged[-1] if merged else None
        if last is not None and last.kind == op.kind == "exchange" and last.nbytes == op.nbytes:
            mean = (last.repeat * last.code_s + code_s) / (last.repeat + 1)
            merged[-1] = last._replace(code_s=mean, repeat=last.repeat + 1)
        else:
            merged.append(op._replace(code_s=code_s))
    return Work(tuple(merged), after)


def _config(scheme: Scheme) -> Config:
    return Config.load({"scheme": scheme.name, **scheme.model_dump()})


def clock(device: str) -> Callable[[], float]:
    """Seconds; on a GPU, after it has done what it was given."""
    if not device.startswith("cuda"):
        return time.perf_counter

    def synchronized() -> float:
        torch.cuda.synchronize(device)
        return time.perf_counter()

    return synchronized


def slowest(works: list[Work]) -> Work:
    """The longest of each stretch over ranks."""
    if len({tuple((op.kind, op.repeat) for op in work.operations) for work in works}) > 1:
        return max(works, key=lambda work: work.code_s)
    operations = [max(ops, key=lambda op: op.code_s) for ops in zip(*(work.operations for work in works))]
    return Work(tuple(operations), max(work.after_s for work in works))
