"""A modelled network around the real server and workers: what a run would take on hosts behind links of a given rate.

Computing and coding take what they were measured to take here, each a constant of the run; a message takes its bytes
over the rate, behind those that wait for the same port. The server has one port, so messages to different workers
queue for its way out, and theirs for its way in; both directions work at once. TCP, interrupts and other tenants of
the machines are not modelled; `asylpg-netlab` measures real processes on real sockets.
"""

from __future__ import annotations

import time
from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import median

from compression_plugins.parameter_server import messages
from compression_plugins.parameter_server.messages import Kind, Message
from compression_plugins.parameter_server.options import Options
from compression_plugins.parameter_server.problem import Problem
from compression_plugins.parameter_server.server import Server
from compression_plugins.parameter_server.simulate import Simulation
from compression_plugins.parameter_server.worker import Worker

LATENCY_S = 50e-6


@dataclass(frozen=True)
class Costs:
    """Seconds of one process.

    Attributes:
        answer: a worker's, from a model to the gradient message.
        sample: a worker's, for each sample of a gradient sum.
        update: the server's, from a gradient message to the next model.
    """

    answer: float = 0.0
    sample: float = 0.0
    update: float = 0.0


class Clock(Simulation):
    """`Simulation` whose order of arrivals follows from time. Equal costs give equal runs, bit for bit.

    Args:
        costs: of computing and coding.
        rate: of every port, each way, in bits per second.

    Attributes:
        now: seconds since the start.
        measured: durations of the calls that this run really made, by what they were; see `calibrate`.
    """

    def __init__(
        self,
        server: Server,
        workers: Sequence[Worker],
        costs: Costs,
        rate: float,
        on_update: Callable[[Server], None] | None = None,
    ) -> None:
        super().__init__(server, workers, on_update=on_update)
        self.costs, self.rate, self.now = costs, rate, 0.0
        self.measured: dict[str, list[float]] = defaultdict(list)
        self._out_free = self._in_free = 0.0
        self._worker_free = dict.fromkeys(self.workers, 0.0)
        self._ready: dict[int, deque[float]] = {rank: deque() for rank in self.workers}

    def _deliver(self) -> None:
        while self.server.outbox:
            rank, message = self.server.outbox.popleft()
            self._out_free = max(self._out_free, self.now) + self._transmission(message)
            begin = max(self._out_free + LATENCY_S, self._worker_free[rank])
            watch = time.process_time()
            answer = self.workers[rank].handle(self._through_the_wire(message, messages.DOWN))
            spent = time.process_time() - watch
            if answer is None:
                continue
            if answer.kind is Kind.TOTAL:
                self.measured["sample"].append(spent / answer.count)
                self._worker_free[rank] = begin + answer.count * self.costs.sample
            else:
                self.measured["answer"].append(spent)
                self._worker_free[rank] = begin + self.costs.answer
            self._answers[rank].append(self._through_the_wire(answer, messages.UP))
            self._ready[rank].append(self._worker_free[rank])

    def _next(self) -> int | None:
        waiting = [(times[0], rank) for rank, times in self._ready.items() if times]
        if not waiting:
            return None
        sent, rank = min(waiting)
        self._ready[rank].popleft()
        self._in_free = max(self._in_free, sent) + self._transmission(self._answers[rank][0])
        self.now = max(self.now, self._in_free + LATENCY_S) + self.costs.update
        return rank

    def advance(self) -> bool:
        self._deliver()
        watch, step = time.process_time(), self.server.step
        going = super().advance()
        if self.server.step == step + 1:
            self.measured["update"].append(time.process_time() - watch)
        return going

    def _transmission(self, message: Message) -> float:
        return 8 * message.nbytes / self.rate


def calibrate(options: Options, problem: Problem, updates: int = 40) -> Costs:
    """Median costs of a short run of these options on this machine."""
    options = options.model_copy(update={"epochs": 2, "inner_steps": updates // 2})
    server = Server(options, problem.start(), problem.samples)
    clock = Clock(server, [Worker(rank, options, problem) for rank in range(options.workers)], Costs(), rate=1e9)
    clock.run()
    return replace(Costs(), **{name: median(values) for name, values in clock.measured.items()})
