"""The training loop that the bench's workers share. It knows nothing of compression.

`worker_horovod.py`, `worker_deepspeed.py` and `worker_ddp.py` say what a host framework's script says; the rest, data,
schedule and measuring, is here, so that hosts are compared on equal work.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler

from launch.lab.measure import ComputeOnly, Recorder

from . import models
from .synthetic import Synthetic

#: How often the same step is timed without communication during a run, in which both share the machine's mood.
_COMPUTE_SAMPLES = 5

Loss = Callable[[nn.Module], Tensor]


class Host(Protocol):
    """What a host framework's training script does besides the loop."""

    rank: int
    ranks: int

    def prepare(self, model: nn.Module, optimizer: Optimizer, schedule: LRScheduler | None, batch: int) -> None:
        """Hand the model to the framework and make all ranks' weights equal."""

    def step(self, loss_of: Loss) -> Tensor:
        """Forward, backward, averaging and update; returns this rank's loss."""

    def model(self) -> nn.Module:
        """The network itself, for evaluation."""

    def barrier(self) -> None:
        """Block until every rank is here."""

    def close(self) -> None:
        """Shut the framework down in an orderly way."""

    def about(self) -> dict[str, object]:
        """More facts for the record, such as the memory a peer's compression holds."""


class OrdinaryStep:
    """The step of a script whose host works behind `backward()` and `optimizer.step()`."""

    _net: nn.Module
    _optimizer: Optimizer
    _schedule: LRScheduler | None

    def step(self, loss_of: Loss) -> Tensor:
        self._optimizer.zero_grad()
        loss = loss_of(self._net)
        loss.backward()
        self._optimizer.step()
        if self._schedule:
            self._schedule.step()
        return loss


def parser(description: str | None) -> argparse.ArgumentParser:
    """A parser of the options that every worker takes."""
    found = argparse.ArgumentParser(description=description)
    found.add_argument("--model", required=True)
    found.add_argument("--compute-ms", type=float, help="time of a step of a synthetic model")
    found.add_argument("--steps", type=int, required=True)
    found.add_argument("--evaluate-every", type=int, default=0, help="steps; 0: never")
    found.add_argument("--seed", type=int, default=0, help="of the initial weights and the order of the data")
    found.add_argument("--peer", default="none", help="compression that the host framework itself brings")
    found.add_argument("--record", type=Path, required=True, help="folder of the measurements")
    found.add_argument("--interface", default="lo", help="network interface whose bytes are counted")
    return found


def train(options: argparse.Namespace, host: Host) -> None:
    """Train, and write `rankR.jsonl` (see `launch.lab.measure`) and rank 0's `about.json` into `options.record`."""
    torch.set_num_threads(1)
    torch.manual_seed(options.seed)
    task = models.load(options.model, options.compute_ms)
    model = task.model(options.seed)
    optimizer = task.optimizer(model.parameters())
    # Evaluated runs decay their rate to zero, as training does; a timed one is too short for that to matter.
    schedule = CosineAnnealingLR(optimizer, options.steps) if options.evaluate_every else None
    recorder = Recorder(options.record, host.rank, host.ranks, options.interface)
    data = task.batches(host.rank, host.ranks, options.seed)
    group = optimizer.param_groups[0]
    alone = None if isinstance(model, Synthetic) else ComputeOnly(model, group["lr"], group.get("momentum", 0.0))
    if isinstance(model, Synthetic):
        model.personal(host.rank)
        _time_alone(model, recorder)
    host.prepare(model, optimizer, schedule, task.batch)

    every = max(1, options.steps // _COMPUTE_SAMPLES)
    for step, batch in zip(range(1, options.steps + 1), data):

        def loss_of(net: nn.Module) -> Tensor:
            return task.loss(net, batch)  # noqa: B023 - called at once

        with recorder.step(step):
            loss = host.step(loss_of)

        last = step == options.steps
        evaluate = options.evaluate_every and (step % options.evaluate_every == 0 or last)
        if alone is not None and (step % every == 0 or last):
            recorder.compute(alone.seconds(loss_of))
        if evaluate and host.rank == 0:
            host.model().eval()
            recorder.evaluation(step, task.evaluate(host.model()), loss.item())  # type: ignore[union-attr]
            host.model().train()
        if evaluate or (alone is not None and step % every == 0):
            host.barrier()
    recorder.close()
    if host.rank == 0:
        numel = sum(parameter.numel() for parameter in host.model().parameters())
        (options.record / "about.json").write_text(json.dumps({"numel": numel, "batch": task.batch, **host.about()}))
    host.barrier()
    host.close()


def _time_alone(model: Synthetic, recorder: Recorder) -> None:
    """Before a host hangs its hooks on the tensors. A copy for later, as of a real model, may not fit in memory."""
    for sample in range(_COMPUTE_SAMPLES + 1):
        begin = time.perf_counter()
        model(torch.zeros(())).backward()
        if sample:
            recorder.compute(time.perf_counter() - begin)
        model.zero_grad()
