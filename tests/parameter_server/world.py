"""Small problems that the tests of the parameter server share."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils.data import TensorDataset

from compression_plugins.parameter_server.options import Options
from compression_plugins.parameter_server.problem import Problem
from compression_plugins.parameter_server.server import Server
from compression_plugins.parameter_server.simulate import Simulation
from compression_plugins.parameter_server.worker import Worker

BASE = {
    "method": "asylpg",
    "workers": 3,
    "lr": 0.2,
    "epochs": 3,
    "inner_steps": 12,
    "batch_size": 8,
    "tau": 4,
    "seed": 3,
}


def data(samples: int = 90, features: int = 10) -> TensorDataset:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(samples, features, generator=generator)
    y = ((x @ torch.randn(features, generator=generator)) > 0).long()
    return TensorDataset(x, y)


def linear(features: int = 10) -> nn.Module:
    model = nn.Linear(features, 2)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.linspace(-0.3, 0.3, p.numel()).view_as(p))
    return model


def problem() -> Problem:
    return Problem(linear(), nn.functional.cross_entropy, data())


def options(**changes: Any) -> Options:
    return Options.load({**BASE, **changes})


def simulation(chosen: Options, **arguments: Any) -> Simulation:
    """With fresh server and workers; `on_checkpoint` goes to the server, the rest to the simulation."""
    common = problem()
    checkpoint = arguments.pop("on_checkpoint", None)
    server = Server(chosen, common.start(), common.samples, on_checkpoint=checkpoint)
    return Simulation(server, [Worker(rank, chosen, common) for rank in range(chosen.workers)], **arguments)
