"""Worker processes of this machine: started, watched, and started again when they die."""

from __future__ import annotations

import copy
import logging
import multiprocessing
import pickle
import signal
import sys
import threading
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

from ..errors import CompressionError, ConfigError
from .client import run_worker
from .options import Options
from .problem import Forward, Problem
from .worker import Worker

log = logging.getLogger("compression_plugins.parameter_server")
_CONTEXT = multiprocessing.get_context("spawn")
#: Exit status of a worker that stopped for a reason that it knows, and that a second start would not change.
_REFUSED = 2
_GOODBYE_S = 5.0


class Processes:
    """One process per worker. A worker that dies is started again, at most `restarts` times.

    Args:
        count: workers, of ranks 0 .. count - 1.
        restarts: of each worker.
        arguments: of `work`, after the rank; they travel by pickle.
    """

    def __init__(self, count: int, restarts: int, arguments: tuple[Any, ...]) -> None:
        self._restarts, self._arguments = restarts, arguments
        self._processes = [self._new(rank) for rank in range(count)]
        self._used = [0] * count
        self._lost: set[int] = set()
        self._starters: list[threading.Thread] = []

    def start(self) -> None:
        """Raises `ConfigError` if something that the workers need cannot be sent to them."""
        for process in self._processes:
            try:
                process.start()
            except (pickle.PicklingError, AttributeError, TypeError) as error:
                raise ConfigError(
                    f"workers are processes of their own, and something that they need cannot be sent ({error}); use "
                    "functions and classes of a module instead of lambdas or local ones, or delays=[...] to run here"
                ) from None

    def check(self) -> None:
        """Start again who died; raise when nobody is left."""
        for rank, process in enumerate(self._processes):
            status = process.exitcode
            if status in (None, 0) or rank in self._lost:
                continue
            died = f"worker process {rank} {_how(status)}"
            if status == _REFUSED:
                self._give_up(rank, f"{died}; its own message stands above")
            elif self._used[rank] == self._restarts:
                self._give_up(rank, f"{died} and is not started again: restarts = {self._restarts} are used up")
            else:
                self._used[rank] += 1
                log.warning("%s; starting it again, %d of %d times", died, self._used[rank], self._restarts)
                self._processes[rank] = self._new(rank)
                # In a thread: the arguments pass through a pipe that the child empties after seconds of imports, and
                # the server would answer nobody meanwhile.
                self._starters.append(threading.Thread(target=self._start_again, args=(rank,)))
                self._starters[-1].start()
        if len(self._lost) == len(self._processes):
            raise CompressionError("every worker process has failed; the reasons stand above")

    def stop(self) -> None:
        """Wait a moment for everybody to end, then end them."""
        for starter in self._starters:
            starter.join()
        deadline = time.monotonic() + _GOODBYE_S
        started = [process for process in self._processes if process.pid is not None]
        for process in started:
            process.join(max(0.0, deadline - time.monotonic()))
        for process in started:
            if process.is_alive():
                process.terminate()
                process.join(_GOODBYE_S)

    def _new(self, rank: int) -> BaseProcess:
        return _CONTEXT.Process(target=work, args=(rank, *self._arguments), name=f"worker-{rank}", daemon=True)

    def _start_again(self, rank: int) -> None:
        try:
            self._processes[rank].start()
        except Exception as error:  # in a thread nobody else would hear of it
            self._give_up(rank, f"worker process {rank} cannot be started again: {error}")

    def _give_up(self, rank: int, reason: str) -> None:
        self._lost.add(rank)
        log.warning("%s", reason)


def _how(status: int) -> str:
    if status >= 0:
        return f"ended with exit code {status}"
    return f"was ended by signal {-status} ({signal.strsignal(-status)})"


def work(
    rank: int,
    options: Options,
    model: nn.Module,
    loss_fn: Callable[[Any, Any], torch.Tensor] | None,
    data: Any,
    collate: Any,
    forward: Forward | None,
    device: str,
    address: tuple[str, int],
    token: bytes,
) -> None:
    """Body of a worker process. One thread each, since all of them share the machine's cores."""
    torch.set_num_threads(1)
    if device == "cuda":
        device = f"cuda:{rank % torch.cuda.device_count()}"
    loader = DataLoader(data, collate_fn=collate)
    try:
        problem = Problem(copy.deepcopy(model), loss_fn, loader, forward, device)
        run_worker(Worker(rank, options, problem), address, token)
    except CompressionError as error:
        print(f"worker {rank}: {error}", file=sys.stderr)
        raise SystemExit(_REFUSED) from None
