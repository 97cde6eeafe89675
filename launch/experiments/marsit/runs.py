"""Training runs that Marsit's experiments share: 784-128-10 on images, one global batch split over the workers."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import cache
from multiprocessing import get_context
from statistics import mean
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR

from compression_plugins.config import Config
from launch.task import Digits, batches, load_digits

from ..fashion import load_fashion
from ..simulated import Cluster

#: Weights of the network. It has no biases: they travel dense under every scheme, and would add 0.08 bits per element
#: in a network this small.
NUMEL = 784 * 128 + 128 * 10
#: Images a step, of all workers together: accuracies are comparable over numbers of workers.
GLOBAL_BATCH = 256
MOMENTUM = 0.9
#: Where a run counts as diverged and stops. Cross-entropy starts at 2.3.
_DIVERGED = 1e4

_OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": torch.optim.SGD,
    "momentum": lambda parameters, lr: torch.optim.SGD(parameters, lr=lr, momentum=MOMENTUM),
    "adam": torch.optim.Adam,
}


@dataclass(frozen=True)
class Job:
    """One training run. `quick`: on MNIST-5k instead of Fashion-MNIST."""

    method: str
    config: Mapping[str, Any]
    lr: float
    workers: int
    seed: int
    steps: int
    optimizer: str = "sgd"
    quick: bool = False


@dataclass
class Run:
    """What a job showed.

    Attributes:
        accuracy: on the test images, percent.
        loss: mean training loss of the last quarter of the steps; infinite if the run diverged, where it stopped.
        bits: sent a step and element, mean over workers.
        curve: training loss, means of ten steps.
    """

    job: Job
    accuracy: float
    loss: float
    bits: float
    curve: list[float] = field(default_factory=list)

    def fields(self) -> dict[str, Any]:
        """For a record; null stands for an infinite loss."""
        return {
            **vars(self.job),
            "config": dict(self.job.config),
            "accuracy": self.accuracy,
            "loss": self.loss if self.loss < _DIVERGED else None,
            "bits": self.bits,
            "curve": self.curve,
        }


def train(job: Job) -> Run:
    """Train once; the learning rate falls to zero along a cosine."""
    train_set, test_set = _data(job.quick)
    torch.manual_seed(job.seed)
    model = nn.Sequential(nn.Linear(784, 128, bias=False), nn.ReLU(), nn.Linear(128, 10, bias=False))
    optimizer = _OPTIMIZERS[job.optimizer](model.parameters(), lr=job.lr)
    schedule = CosineAnnealingLR(optimizer, job.steps)
    cluster = Cluster(model, optimizer, Config.load({**job.config, "seed": job.seed}), job.workers)
    share = GLOBAL_BATCH // job.workers
    streams = [batches(train_set, share, rank, job.workers, job.seed) for rank in range(job.workers)]
    losses: list[float] = []
    while len(losses) < job.steps and (not losses or losses[-1] < _DIVERGED):
        losses.append(cluster.step(lambda model, rank: _loss(model, next(streams[rank]))))
        schedule.step()
    whole = len(losses) == job.steps and losses[-1] < _DIVERGED
    with torch.no_grad():
        hits = model(test_set.images).argmax(1) == test_set.labels
    return Run(
        job,
        accuracy=100 * float(hits.float().mean()),
        loss=mean(losses[-(job.steps // 4) :]) if whole else float("inf"),
        bits=8 * mean(cluster.sent) / NUMEL / len(losses),
        curve=[mean(losses[i : i + 10]) for i in range(0, len(losses), 10)] if whole else [],
    )


def train_all(jobs: Sequence[Job], processes: int | None = None) -> Iterator[Run]:
    """The jobs' runs, in their order; in as many processes as there are cores unless told otherwise."""
    processes = processes or len(os.sched_getaffinity(0))
    if processes == 1:
        yield from map(train, jobs)
        return
    with ProcessPoolExecutor(processes, get_context("spawn"), torch.set_num_threads, (1,)) as pool:
        yield from pool.map(train, jobs)


def bits_in_theory(flush_steps: float, workers: int) -> float:
    """2(M-1)/M (1 + 31/K): a bit per element both ways round, and 32 every K steps."""
    return 2 * (workers - 1) / workers * (1 + 31 / flush_steps)


def best(runs: Sequence[Run]) -> Run:
    """The run with the lowest training loss."""
    return min(runs, key=lambda run: run.loss)


def _loss(model: nn.Module, batch: Digits) -> Tensor:
    return nn.functional.cross_entropy(model(batch.images), batch.labels)


@cache
def _data(quick: bool) -> tuple[Digits, Digits]:
    return load_digits() if quick else load_fashion()
