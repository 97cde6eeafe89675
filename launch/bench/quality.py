"""What a scheme does to gradients: all ranks in this process, gradients of real training, no network."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compression_plugins.bench.ranks import Ranks
from compression_plugins.bench.timing import one_thread
from compression_plugins.config import Config
from compression_plugins.engine.plan import Plan, TensorSpec, make_plan
from launch.experiments.tasks import Task

from . import models
from .cells import Cell

#: Buckets of one rank at one step, flat fp32.
Flats = list[Tensor]


def measure(cell: Cell) -> dict[str, Any]:
    """Figures of a quality cell, means over `cell.steps` gradients in a row.

    target_ratio, ratio: bytes of a dense fp32 ring over those that the scheme's arithmetic says, and that it sent.
    vnmse: ||result - mean gradient||^2 / ||mean gradient||^2 of a step.
    cosine: of result and mean gradient.
    bias: as vnmse, of the sums over all steps: what neither unbiased rounding nor a memory takes back.
    state_bytes_per_value: memory that a rank holds.
    """
    task = models.load(cell.model)
    assert isinstance(task, Task) and cell.config is not None
    config = Config.load(cell.config)
    with one_thread():
        model = task.model(cell.seed)
        named = {name: p for name, p in model.named_parameters() if p.requires_grad}
        plan = make_plan(config, [TensorSpec(name, tuple(p.shape), "float32") for name, p in named.items()])
        return _figures(config, plan, cell.ranks, _gradients(task, model, plan, cell))


def _gradients(task: Task, model: nn.Module, plan: Plan, cell: Cell) -> Iterator[list[Flats]]:
    """`flats[rank][bucket]` for each step of dense training, so that all schemes see the same."""
    named = dict(model.named_parameters())
    optimizer = task.optimizer(model.parameters())
    data = [task.batches(rank, cell.ranks, cell.seed) for rank in range(cell.ranks)]
    for _ in range(cell.steps):
        flats, total = [], [torch.zeros_like(p) for p in named.values()]
        for batches in data:
            optimizer.zero_grad()
            task.loss(model, next(batches)).backward()
            gradients = {name: _gradient(p) for name, p in named.items()}
            flats.append([torch.cat([gradients[s.name].flatten() for s in b.segments]) for b in plan.buckets])
            total = [mine + gradient / cell.ranks for mine, gradient in zip(total, gradients.values())]
        for parameter, mean in zip(named.values(), total):
            parameter.grad = mean
        optimizer.step()
        yield flats


def _gradient(parameter: nn.Parameter) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.clone()


def _figures(config: Config, plan: Plan, ranks: int, steps: Iterator[list[Flats]]) -> dict[str, Any]:
    world = Ranks(config, ranks)
    errors, cosines, result_sum, target_sum = [], [], torch.zeros(1), torch.zeros(1)
    for flats in steps:
        target = torch.cat([torch.stack(list(each)).mean(0) for each in zip(*flats)])
        result = torch.cat(world.average(plan.buckets, [[flat.clone() for flat in mine] for mine in flats]))
        world.end_step()
        errors.append(_relative(result, target))
        cosines.append(float(F.cosine_similarity(result.double(), target.double(), dim=0)))
        result_sum, target_sum = result_sum + result, target_sum + target
    numel = sum(bucket.numel for bucket in plan.buckets)
    dense = 8 * numel * (ranks - 1) / ranks
    nominal = sum(bucket.wire_bytes(ranks) for bucket in plan.buckets)
    sent = sum(world.sent) / ranks / len(errors)
    return {
        "numel": numel,
        "target_ratio": dense / nominal,
        "ratio": dense / sent,
        "vnmse": sum(errors) / len(errors),
        "cosine": sum(cosines) / len(cosines),
        "bias": _relative(result_sum, target_sum),
        "state_bytes_per_value": sum(reducer.state.nbytes() for reducer in world.reducers) / ranks / numel,
    }


def _relative(result: Tensor, target: Tensor) -> float:
    return float((result - target).square().sum() / target.square().sum())
