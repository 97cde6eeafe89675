"""What the bench trains: three small networks on real data, and lists of shapes."""

from __future__ import annotations

from dataclasses import replace
from functools import cache, partial

import torch
from torch import Tensor, nn

from launch.experiments.tasks import DIGITS_CNN, TRANSFORMER, Images, Task
from launch.task import load_digits, perceptron

from .settings import REAL_MODELS
from .synthetic import SyntheticTask

#: The demonstration's job: 5.8 million parameters, MNIST-5k, batches of 32 a rank.
PERCEPTRON = Images(
    "perceptron, MNIST-5k", perceptron, partial(torch.optim.SGD, lr=0.2, momentum=0.5), 32, cache(load_digits)
)
_TASKS: dict[str, Task] = {"mlp": PERCEPTRON, "cnn": DIGITS_CNN, "transformer": replace(TRANSFORMER, batch=8)}
assert set(_TASKS) == set(REAL_MODELS)


def load(name: str, compute_ms: float | None = None) -> Task | SyntheticTask:
    """The task called `name`; `compute_ms` is the time of a step of a synthetic one."""
    if name in _TASKS:
        return _TASKS[name]
    if compute_ms is None:
        raise ValueError(f"{name} computes nothing by itself: compute_ms is missing")
    return SyntheticTask(name, compute_ms / 1e3)


def optimizer(name: str) -> str:
    """What the real model called `name` is trained with, as `advise --optimizer` calls it."""
    task = _TASKS[name]
    return "adam" if "betas" in task.optimizer(task.model(0).parameters()).defaults else "sgd"


def mlp() -> tuple[nn.Module, Tensor]:
    """The perceptron, and the batch of one rank, for `advise --model launch.bench.models:mlp`."""
    return _example("mlp")


def cnn() -> tuple[nn.Module, Tensor]:
    """The convolutional network and the batch of one rank, as `mlp`."""
    return _example("cnn")


def transformer() -> tuple[nn.Module, Tensor]:
    """The transformer and the batch of one rank, as `mlp`."""
    return _example("transformer")


def _example(name: str) -> tuple[nn.Module, Tensor]:
    task = _TASKS[name]
    return task.model(0), next(task.batches(0, 2, 0)).inputs
