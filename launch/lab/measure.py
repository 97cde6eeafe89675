"""What one rank measures about its own training, written as JSON lines: one object a step, one an evaluation.

Records (`kind`): "start" {rank, ranks, host, interface}; "step" {step, loss, seconds, sent_bytes, ...}; "compute"
{seconds}; "evaluation" {step, train_s, accuracy}; "end". `train_s` is the sum of the steps' times, so what an
evaluation costs never counts as training.
"""

from __future__ import annotations

import copy
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn


def sent_bytes(interface: str) -> int:
    """Bytes sent over a network interface of this host so far, headers included, from the kernel's counter."""
    return int(Path(f"/sys/class/net/{interface}/statistics/tx_bytes").read_text())


class Stopwatch:
    """Adds up named stretches of one step."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        begin = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - begin


class Recorder:
    """Writes the records of one rank to `DIRECTORY/rankR.jsonl`.

    Args:
        directory: made if missing.
        rank, ranks: of this process.
        interface: whose counter tells the bytes sent, "eth0" or "lo".
    """

    def __init__(self, directory: Path, rank: int, ranks: int, interface: str) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self._file = open(directory / f"rank{rank}.jsonl", "w", buffering=1)
        self._interface = interface
        self._train_s = 0.0
        self._write("start", rank=rank, ranks=ranks, host=os.uname().nodename, interface=interface)

    @contextmanager
    def step(self, number: int) -> Iterator[Stopwatch]:
        """Times one training step. Stretches named on the yielded stopwatch are recorded as `NAME_s`."""
        watch, before, begin = Stopwatch(), sent_bytes(self._interface), time.perf_counter()
        yield watch
        seconds = time.perf_counter() - begin
        self._train_s += seconds
        parts = {f"{name}_s": value for name, value in watch.seconds.items()}
        self._write("step", step=number, seconds=seconds, sent_bytes=sent_bytes(self._interface) - before, **parts)

    def evaluation(self, step: int, accuracy: float, loss: float) -> None:
        """Accuracy (0 to 1) of the common model after `step` steps and the last training loss."""
        self._write("evaluation", step=step, train_s=self._train_s, accuracy=accuracy, loss=loss)

    def compute(self, seconds: float) -> None:
        """Time of the same step without any communication; see `ComputeOnly`."""
        self._write("compute", seconds=seconds)

    def close(self) -> None:
        self._write("end", train_s=self._train_s)
        self._file.close()

    def _write(self, kind: str, **fields: object) -> None:
        self._file.write(json.dumps({"kind": kind, **fields}) + "\n")


class ComputeOnly:
    """A twin of the model that takes the same step without a host framework.

    A step's time beyond the twin's is the exposed cost of communicating: waiting, encoding, decoding and whatever
    the overlapped part takes from the computation. Timed now and then during the run, on the same core under the
    same conditions.
    """

    def __init__(self, model: nn.Module, lr: float, momentum: float) -> None:
        self._model = copy.deepcopy(model)
        self._optimizer = torch.optim.SGD(self._model.parameters(), lr=lr, momentum=momentum)

    def seconds(self, loss_of: Callable[[nn.Module], Tensor]) -> float:
        """Time of forward, backward and update on `loss_of(model)`; a first untimed step warms the caches."""
        for _ in range(2):
            begin = time.perf_counter()
            self._optimizer.zero_grad()
            loss_of(self._model).backward()
            self._optimizer.step()
        return time.perf_counter() - begin
