"""One training: the job, what it showed, and many of them side by side."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from multiprocessing import get_context
from statistics import mean
from time import process_time
from typing import Any

import torch
from torch import nn

from compression_plugins.config import Config

from ..simulated import Cluster, LocalCluster
from .methods import METHODS, SETTINGS, Setting

#: The learning rate rises in a line over this share of the steps, and then falls in a line to 0.
RISE = 0.05
#: Share of the steps at the end whose mean is the training loss.
END = 0.03
#: The short dense training on other data: steps, and its first learning rate as a share of the setting's lowest.
TRANSFER_STEPS, TRANSFER_RATE = 150, 0.5
#: Of the runs that choose learning rates.
TUNING_SEED, TUNING_WORKERS = 100, 4
#: A loss of so many bits ends a run; guessing costs fewer than 7.
DIVERGED = 100.0
_POINTS = 50  # of a curve


@dataclass(frozen=True)
class Job:
    """One training. Its setting and its method are names of `methods`."""

    setting: str
    method: str
    steps: int
    seed: int
    workers: int
    lr: float = 0.0

    def __str__(self) -> str:
        where = f"{self.setting}, n = {self.workers}, {self.steps} steps"
        return f"{where}: {self.method}, lr {self.lr:g}, seed {self.seed}"


@dataclass(frozen=True)
class Run:
    """What a job showed. A training that diverges stops: it has no value, loss or transfer.

    Attributes:
        value: on data that training has not seen, in the task's unit.
        loss: of training, over the last of the steps, bits.
        transfer: on other data, after a short dense training there, bits a character.
        sent: bytes that a rank sent, the mean over ranks.
        dense: that it would have sent in as many dense all-reduces in fp32.
        sent_after, dense_after: the same since the warm-up.
        step_s: seconds of the processor for a step of all workers.
        curve: training loss in bits, means of fiftieths of the run.
    """

    job: Job
    value: float | None
    loss: float | None
    transfer: float | None
    sent: float
    dense: float
    sent_after: float
    dense_after: float
    step_s: float
    curve: list[float]

    @property
    def less(self) -> float:
        """How many times fewer bytes than dense, in the whole run."""
        return self.dense / self.sent

    @property
    def less_after(self) -> float:
        """The same after the warm-up."""
        return self.dense_after / self.sent_after if self.sent_after else math.inf

    def record(self) -> dict[str, Any]:
        """JSON-able; `from_record` reads it."""
        return {**asdict(self.job), "config": _configuration(self.job), **{key: getattr(self, key) for key in _OWN}}

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Run | None:
        """None for a record of a method that is gone, or no longer what it was."""
        job = Job(**{each.name: record[each.name] for each in fields(Job)})
        if job.method not in METHODS or record["config"] != _configuration(job):
            return None
        return cls(job, **{key: record[key] for key in _OWN})


_OWN = [each.name for each in fields(Run) if each.name != "job"]


def document(job: Job) -> dict[str, Any]:
    """The configuration of a job: by default biases and norms travel as they are, in these networks as in others."""
    method = METHODS[job.method]
    common = {"warmup_steps": _share(method.warmup, job), "seed": job.seed}
    return {**common, **method.config}


def _configuration(job: Job) -> dict[str, Any]:
    """The whole of it, defaults too, as JSON gives it back."""
    whole: dict[str, Any] = json.loads(json.dumps(Config.load(document(job)).to_dict()))
    return whole


def cluster(job: Job) -> Cluster | LocalCluster:
    """The workers of a job."""
    setting, method = SETTINGS[job.setting], METHODS[job.method]
    optimizer = partial(method.optimizer or setting.optimizer, lr=job.lr)
    config = Config.load(document(job))
    if config.every > 1:
        return LocalCluster(lambda: setting.task.model(job.seed), optimizer, config, job.workers)
    model = setting.task.model(job.seed)
    return Cluster(model, optimizer(model.parameters()), config, job.workers)


def train(job: Job) -> Run:
    """Train once, evaluate, and train a little more on other data."""
    setting, workers = SETTINGS[job.setting], cluster(job)
    task = replace(setting.task, batch=setting.batch)
    batches = [task.batches(rank, job.workers, job.seed) for rank in range(job.workers)]
    warmup, rise = workers.ranks.reducers[0].config.warmup_steps, _share(RISE, job)
    losses: list[float] = []
    sent = [0.0]
    started = process_time()
    for step in range(job.steps):
        for optimizer in workers.optimizers:
            _set_rate(optimizer, job.lr * min((step + 1) / rise, (job.steps - step) / (job.steps - rise)))
        losses.append(workers.step(lambda model, rank: task.loss(model, next(batches[rank]))) / math.log(2))
        sent.append(mean(workers.sent))
        if not losses[-1] < DIVERGED:
            break
    workers.finish()
    sent[-1] = mean(workers.sent)
    seconds = process_time() - started
    whole = losses[-1] < DIVERGED
    dense, done, part = _dense_bytes(workers, job), len(losses), max(1, job.steps // _POINTS)
    return Run(
        job,
        value=task.evaluate(workers.model) if whole else None,
        loss=mean(losses[-_share(END, job) :]) if whole else None,
        transfer=transfer(setting, workers.model, job.seed, min(TRANSFER_STEPS, job.steps)) if whole else None,
        sent=sent[-1],
        dense=dense * done,
        sent_after=sent[-1] - sent[min(warmup, done)],
        dense_after=dense * (done - min(warmup, done)),
        step_s=seconds / done,
        curve=[round(mean(losses[i : i + part]), 4) for i in range(0, done, part)] if whole else [],
    )


def train_all(jobs: Iterable[Job], processes: int | None = None) -> Iterator[Run]:
    """The jobs' runs as they come; in as many processes as there are cores unless told otherwise."""
    processes = processes or len(os.sched_getaffinity(0))
    if processes == 1:
        yield from map(train, jobs)
        return
    with ProcessPoolExecutor(processes, get_context("spawn"), torch.set_num_threads, (1,)) as pool:
        try:
            for each in as_completed([pool.submit(train, job) for job in jobs]):
                yield each.result()
        finally:
            pool.shutdown(cancel_futures=True)


def transfer(setting: Setting, model: nn.Module, seed: int, steps: int) -> float | None:
    """The figure of merit on other data, after a short dense training there that begins with `model` and changes it."""
    if setting.transfer is None:
        return None
    task = replace(setting.transfer, batch=4 * setting.batch)
    first = TRANSFER_RATE * min(setting.rates)
    optimizer, batches = setting.optimizer(model.parameters(), lr=first), task.batches(0, 1, seed)
    for step in range(steps):
        _set_rate(optimizer, first * (1 - step / steps))
        optimizer.zero_grad()
        task.loss(model, next(batches)).backward()
        optimizer.step()
    return task.evaluate(model)


def _share(part: float, job: Job) -> int:
    return max(1, round(part * job.steps)) if part else 0


def _set_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr


def _dense_bytes(workers: Cluster | LocalCluster, job: Job) -> float:
    """That a rank sends in one dense step."""
    return sum(bucket.dense_bytes(job.workers) for bucket in workers.plan.buckets)
