"""Worker processes that die: started again, taken in again, and nobody else stops meanwhile."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from compression_plugins.errors import CompressionError
from compression_plugins.parameter_server import AsyncTrainer, Epoch
from compression_plugins.parameter_server.server import Server

from .test_trainer import launch
from .world import data, linear

pytestmark = pytest.mark.alone

FAST: dict[str, Any] = {"lr": 0.1, "inner_steps": 10, "workers": 2, "progress": False}


def cross_entropy(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def slow(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    time.sleep(0.01)
    return cross_entropy(model, batch)


def fatal_for_one(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    if multiprocessing.current_process().name == "worker-1":
        os._exit(3)
    return slow(model, batch)


def fatal(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    os._exit(3)


def matrix_for_one(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    value = slow(model, batch)
    return value.expand(2) if multiprocessing.current_process().name == "worker-1" else value


class Enough(Exception):
    """Ends a run from its progress callback."""


def train_until(condition: Callable[[Server], bool], forward: Any, **settings: Any) -> Server:
    """Train, without an end of its own, until `condition` holds at a snapshot."""
    limit = time.monotonic() + 100

    def progress(row: Epoch) -> None:
        server = trainer.server
        assert server is not None and time.monotonic() < limit, "this took too long"
        if condition(server):
            raise Enough

    options = {**FAST, "epochs": 100_000, "progress": progress, **settings}
    trainer = AsyncTrainer(linear(), None, data(), forward=forward, **options)
    RUNNING[:] = [trainer]
    with pytest.raises(Enough):
        trainer.fit()
    assert trainer.server is not None
    return trainer.server


RUNNING: list[AsyncTrainer] = []


class Watcher(threading.Thread):
    """Kills worker 1 after 15 updates, and keeps samples of (seconds, updates, active workers) from then on."""

    def __init__(self) -> None:
        super().__init__()
        self.over, self.samples, self.arrivals = threading.Event(), [], 0  # type: threading.Event, list[Any], int

    def run(self) -> None:
        while not self.over.wait(0.01):
            server = RUNNING[0].server if RUNNING else None
            if server is None or server.step <= 15:
                continue
            if not self.samples:
                pid = next(p.pid for p in multiprocessing.active_children() if p.name == "worker-1")
                self.arrivals = len(server.arrivals)
                os.kill(pid or 0, signal.SIGKILL)
            self.samples.append((time.monotonic(), server.step, server.active))

    def alone(self) -> list[tuple[float, int]]:
        return [(when, step) for when, step, active in self.samples if active == [0]]


def test_a_killed_worker_is_started_again_and_gets_its_shard_back_while_the_other_goes_on(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, "compression_plugins.parameter_server")
    RUNNING.clear()
    watcher = Watcher()
    watcher.start()
    try:
        server = train_until(
            lambda s: bool(watcher.alone()) and s.active == [0, 1] and 1 in s.arrivals[watcher.arrivals + 10 :], slow
        )
    finally:
        watcher.over.set()
        watcher.join()
    assert "worker process 1 was ended by signal 9 (Killed); starting it again, 1 of 3 times" in caplog.text
    assert "worker 1 dropped" in caplog.text and "worker 1 joins" in caplog.text
    assert server.parts == {0: [0], 1: [1]}
    alone = watcher.alone()
    assert alone[-1][1] - alone[0][1] > 10, "the other makes updates alone"
    changes = [when for (when, step), (_, before) in zip(alone[1:], alone) if step > before]
    assert max(b - a for a, b in zip(changes, changes[1:])) < 1, "and at no time stops"


def test_a_worker_that_keeps_dying_is_given_up_after_its_restarts(caplog: pytest.LogCaptureFixture) -> None:
    given_up = "worker process 1 ended with exit code 3 and is not started again: restarts = 1 are used up"
    server = train_until(lambda s: given_up in caplog.text and s.active == [0], fatal_for_one, restarts=1)
    assert server.parts == {0: [0, 1]}, "its data go to the other"
    assert caplog.text.count("worker process 1 ended with exit code 3; starting it again, 1 of 1 times") == 1


def test_when_everybody_keeps_dying_the_run_ends_with_one_error() -> None:
    begin = time.monotonic()
    with pytest.raises(CompressionError, match="every worker process has failed"):
        AsyncTrainer(linear(), None, data(), forward=fatal, **FAST, restarts=0).fit()
    assert time.monotonic() - begin < 60, "not after start_s"


def test_a_worker_that_knows_why_it_stops_is_not_started_again(
    caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    told = "worker process 1 ended with exit code 2; its own message stands above"
    train_until(lambda _: told in caplog.text, matrix_for_one)
    assert "starting it again" not in caplog.text
    assert "worker 1: the loss has shape (2,)" in capfd.readouterr().err


def slow_task() -> tuple[nn.Module, Any, Any]:
    """For the launcher."""
    return linear(), Slow(), data()


class Slow(nn.CrossEntropyLoss):
    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        time.sleep(0.01)
        return super().forward(input, target)


@pytest.mark.skipif(sys.platform != "linux", reason="finds the workers in /proc")
def test_the_launcher_survives_kill_9_of_a_worker(tmp_path: Path) -> None:
    model = tmp_path / "model.pt"
    process = launch(
        "--task", "tests.parameter_server.test_processes:slow_task", "--out", str(model),
        "--set", "workers=2", "epochs=8", "inner_steps=40", "lr=0.1", "method=asylpg",
    )  # fmt: skip
    assert process.stdout is not None
    lines: list[str] = []
    while not any(line.startswith("epoch    1") for line in lines):
        lines.append(process.stdout.readline())
        assert lines[-1], "".join(lines)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    workers = [pid for pid in children if "spawn_main" in Path(f"/proc/{pid}/cmdline").read_text()]
    assert len(workers) == 2
    os.kill(int(workers[0]), signal.SIGKILL)
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 0, "".join(lines) + out
    assert "was ended by signal 9 (Killed); starting it again, 1 of 3 times" in out and "320 updates" in out
    assert set(torch.load(model, weights_only=True)) == {"weight", "bias"}
