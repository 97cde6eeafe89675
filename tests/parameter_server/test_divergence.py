"""A run that diverges ends, with one error for all; and a long one does not grow."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from compression_plugins.errors import CompressionError
from compression_plugins.parameter_server import records
from compression_plugins.parameter_server.problem import Problem
from compression_plugins.parameter_server.server import Server
from compression_plugins.parameter_server.simulate import Simulation
from compression_plugins.parameter_server.worker import Worker

from .world import data, linear, options, simulation

METHODS = ["asylpg", "sparse_asylpg", "asyfpg", "qsvrg"]


class NaNInTraining(nn.Module):
    """Cross entropy that is NaN for batches as small as those of updates, and right for whole parts of the data."""

    def forward(self, output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        loss = nn.functional.cross_entropy(output, target)
        return loss * (torch.nan if len(target) <= 8 else 1.0)


def run(loss: Any, samples: TensorDataset, **changes: Any) -> Server:
    chosen, task = options(**changes), Problem(linear(), loss, samples)
    server = Server(chosen, task.start(), task.samples)
    return Simulation(server, [Worker(rank, chosen, task) for rank in range(chosen.workers)]).run()


def test_a_sample_with_a_nan_ends_the_run_and_names_who_has_it() -> None:
    samples = data()
    samples.tensors[0][31, 4] = torch.nan  # of part 31 % 3 = 1
    with pytest.raises(CompressionError, match="epoch 0, update 0, worker 1: .*the run diverged; lower lr"):
        run(nn.functional.cross_entropy, samples)


@pytest.mark.parametrize("method", METHODS)
def test_a_gradient_that_is_not_finite_ends_the_run_whatever_it_would_travel_as(method: str) -> None:
    with pytest.raises(CompressionError, match=r"epoch 0, update \d, worker \d: .*the run diverged; lower lr"):
        run(NaNInTraining(), data(), method=method)


def size(owner: object) -> int:
    """Bytes of all that an object keeps, functions aside."""
    kept = {key: value for key, value in vars(owner).items() if not callable(value)}
    return len(pickle.dumps(kept))


def test_five_thousand_updates_keep_no_more_than_one_thousand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "KEPT", 200)
    marks, sizes = (1000, 4990), []  # type: tuple[int, ...], list[int]

    def measure(server: Server) -> None:
        if len(sizes) < len(marks) and server.step >= marks[len(sizes)]:
            sizes.append(sum(map(size, [server, long, *long.workers.values()])))

    chosen = options(epochs=2, inner_steps=2500, batch_size=1)
    long = simulation(chosen, delays=[1, 2, 0], on_update=measure)
    long.server.on_epoch = long.server.on_checkpoint = None
    server = long.run()
    assert server.step == 5000 and len(sizes) == 2
    assert abs(sizes[1] - sizes[0]) < 4000, sizes
    assert 200 <= len(server.delays) < 400 and 200 <= len(server.arrivals) < 400
    assert server.largest_delay >= max(server.delays) > 0
