"""What is compared: tasks with the learning rates to choose among, methods, and which of them train how long."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from compression_plugins.config import read_document

from ..tasks import DIGITS_CNN, LARGE_TRANSFORMER, LSTM, TRANSFORMER, Characters, Task, source_code

_CONFIGS = Path(__file__).parents[3] / "configs" / "transformer"

Optimizer = Callable[..., torch.optim.Optimizer]

_ADAM = partial(torch.optim.Adam, fused=True)
_ADAMW = partial(torch.optim.AdamW, fused=True, weight_decay=0.1)
_MOMENTUM = partial(torch.optim.SGD, momentum=0.9)
#: Of methods whose direction has the moments.
_PLAIN = torch.optim.SGD


class Setting(NamedTuple):
    """A task, and how people train it.

    Attributes:
        optimizer: of a model's parameters, with `lr`.
        rates: learning rates that every method chooses among, dense too.
        batch: samples of a worker in a step.
        transfer: what a trained model learns next, from data of another kind.
    """

    task: Task
    optimizer: Optimizer
    rates: tuple[float, ...]
    batch: int
    transfer: Task | None = None


class Method(NamedTuple):
    """How gradients or weights meet.

    Attributes:
        config: without what all methods have in common, `training.document`.
        optimizer: in the place of the setting's, with the same rates; None: the setting's own.
        warmup: share of the steps that are sent dense.
    """

    config: Mapping[str, Any]
    optimizer: Optimizer | None = None
    warmup: float = 0.05


class Part(NamedTuple):
    """Every method with each length of training, seed and number of workers."""

    setting: str
    methods: tuple[str, ...]
    steps: tuple[int, ...]
    seeds: tuple[int, ...] = (0, 1, 2)
    workers: tuple[int, ...] = (4,)


def _zero_one(refresh: int) -> dict[str, Any]:
    return {"kind": "zero_one_adam", "refresh": refresh}


def _source(task: Characters) -> Characters:
    return Characters("source code", task.build, task.optimizer, task.batch, source_code)


SETTINGS = {
    "transformer": Setting(TRANSFORMER, _ADAM, (0.005, 0.007), 8, _source(TRANSFORMER)),
    "transformer-adamw": Setting(TRANSFORMER, _ADAMW, (0.005, 0.007), 8, _source(TRANSFORMER)),
    "large": Setting(LARGE_TRANSFORMER, _ADAM, (0.002, 0.003), 8, _source(LARGE_TRANSFORMER)),
    "lstm": Setting(LSTM, _MOMENTUM, (1.0, 2.0, 4.0), 4, _source(LSTM)),
    "cnn": Setting(DIGITS_CNN, _MOMENTUM, (0.02, 0.05, 0.1), 8),
}

DENSE = "dense"


def _preset(name: str, **keys: Any) -> Method:
    """`configs/transformer/NAME.yaml`, always in two stages: networks this small would rather save a round."""
    document = read_document(_CONFIGS / f"{name}.yaml")
    return Method({**document, "stages": 2, **keys}, warmup=0.0)


METHODS = {
    DENSE: Method({"scheme": "none"}),
    "bf16": Method({"scheme": "bf16"}),
    "qsgd-4": Method({"scheme": "qsgd", "bits": 4}),
    "sign": Method({"scheme": "ef_signsgd"}),
    "scalecom-50": Method({"scheme": "scalecom", "ratio": 50}),
    "marsit": Method({"scheme": "marsit"}),
    "powersgd-4": Method({"scheme": "powersgd", "rank": 4}),
    "adam-scalecom-50": Method({"scheme": "scalecom", "ratio": 50, "direction": "adam"}, _PLAIN),
    "adam-marsit": Method({"scheme": "marsit", "direction": "adam"}, _PLAIN),
    "frozen-sign": Method({"scheme": "ef_signsgd", "direction": "frozen_adam"}, _PLAIN, warmup=0.15),
    "frozen-scalecom-20": Method({"scheme": "scalecom", "ratio": 20, "direction": "frozen_adam"}, _PLAIN, warmup=0.15),
    "zero-one-sign-16": Method({"scheme": "ef_signsgd", "direction": _zero_one(16)}, _PLAIN),
    "zero-one-sign-64": Method({"scheme": "ef_signsgd", "direction": _zero_one(64)}, _PLAIN),
    "zero-one-scalecom-20": Method({"scheme": "scalecom", "ratio": 20, "direction": _zero_one(64)}, _PLAIN),
    "zero-one-marsit": Method({"scheme": "marsit", "direction": _zero_one(64)}, _PLAIN),
    "local-4": Method({"scheme": "none", "every": 4}, warmup=0.0),
    "local-8-scalecom": Method({"scheme": "scalecom", "ratio": 50, "every": 8}, warmup=0.0),
    "local-8-marsit": Method({"scheme": "marsit", "flush_steps": 25, "every": 8}, warmup=0.0),
    "safe": _preset("safe"),
    "balanced": _preset("balanced"),
    "small": _preset("small"),
    "small, one stage": _preset("small", stages=1),
    "wan": _preset("wan"),
}
#: Methods that leave the optimizer to the script, so that any will do.
_ANY = tuple(name for name, method in METHODS.items() if method.optimizer is None)
PRESETS = ("safe", "balanced", "small", "small, one stage", "wan")

PLAN = (
    Part("transformer", tuple(METHODS), (2000, 6000)),
    Part("transformer", (DENSE, "small", "small, one stage"), (2000,), workers=(2, 8, 16)),
    Part("transformer-adamw", (DENSE, *PRESETS), (2000,)),
    Part("lstm", _ANY, (2000,)),
    Part("cnn", _ANY, (2000,)),
    Part("large", (DENSE, *PRESETS, "scalecom-50", "zero-one-sign-64"), (2000, 6000)),
)
QUICK = (Part("transformer", (DENSE, "sign", "small"), (40,), seeds=(0,), workers=(2,)),)
