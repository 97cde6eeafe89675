"""A model that is only a list of shapes: it computes for a given time and returns given gradients.

For what two cores cannot train. Forward sleeps a third of the time. Backward produces one gradient after the other, the
last tensor first, each after its share of the rest, as its FLOPs have it; a host's hooks follow each, as always.

The model of a device that is not the host's: sleeping leaves the cores to communication. Encoding and decoding run
between the sleeps and delay them, as a kernel delays the others of its stream. Copying a gradient counts as its own
computation.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from compression_plugins.advise.shapes import Shapes, load
from launch.experiments.tasks import Batch

_FORWARD = 1 / 3  # one product a layer forward, two backward


class Clock:
    """What computes: sleeps, and says how late it is.

    Args:
        sleep, now: seconds; replaced in tests.
    """

    def __init__(
        self, sleep: Callable[[float], None] = time.sleep, now: Callable[[], float] = time.perf_counter
    ) -> None:
        self._sleep, self._now = sleep, now
        self._debt = 0.0

    def work(self, seconds: float, do: Callable[[], Tensor | None] = lambda: None) -> Tensor | None:
        """Take `seconds` for `do`, whose own time is part of them; what it takes too long the next ones make up."""
        begin = self._now()
        result = do()
        pause = seconds - self._debt - (self._now() - begin)
        begin = self._now()
        if pause > 0:
            self._sleep(pause)
        # The kernel wakes a sleeper late, some 60 us at a time: hundreds of tensors would add up.
        self._debt = max(0.0, self._now() - begin) - pause
        return result


class _Gradient(torch.autograd.Function):
    """Identity of a chain that runs through all tensors, so that backward visits them one after the other."""

    @staticmethod
    def forward(ctx: Any, chain: Tensor, parameter: Tensor, seconds: float, gradient: Tensor, clock: Clock) -> Tensor:
        ctx.seconds, ctx.gradient, ctx.clock = seconds, gradient, clock
        return chain.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        # A copy: hosts average gradients in place.
        gradient = ctx.clock.work(ctx.seconds, lambda: ctx.gradient.clone())
        return grads[0], gradient, None, None, None


class _Head(torch.autograd.Function):
    """Work at the beginning of backward that completes no gradient: a tied output layer."""

    @staticmethod
    def forward(ctx: Any, chain: Tensor, seconds: float, clock: Clock) -> Tensor:
        ctx.seconds, ctx.clock = seconds, clock
        return chain.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        ctx.clock.work(ctx.seconds)
        return grads[0], None, None


class Synthetic(nn.Module):
    """Parameters of the given shapes, all zeros; `forward` takes and returns a scalar.

    Args:
        shapes: of the tensors, and the FLOPs that distribute the time; by elements where they are not known.
        compute_s: of a whole step without communication.
        seed: of the gradients, which stay the same from step to step.
        clock: replaced in tests.
    """

    def __init__(self, shapes: Shapes, compute_s: float, seed: int, clock: Clock | None = None) -> None:
        super().__init__()
        self.clock = clock or Clock()
        for spec in shapes.specs:
            _place(self, spec.name.split("."), nn.Parameter(torch.zeros(spec.shape)))
        work = shapes.flops or tuple(float(spec.numel) for spec in shapes.specs)
        unit = (1 - _FORWARD) * compute_s / (sum(work) + shapes.head_flops)
        self.forward_s = _FORWARD * compute_s
        self.head_s = shapes.head_flops * unit
        self.backward_s = [each * unit for each in work]
        # One pool as large as the largest tensor: each tensor's gradient is a part of it.
        self._seed, self._pool = seed, torch.empty(0)

    def forward(self, chain: Tensor) -> Tensor:
        self.clock.work(self.forward_s)
        chain = chain.clone().requires_grad_()
        for parameter, seconds in zip(self.parameters(), self.backward_s):
            chain = _Gradient.apply(chain, parameter, seconds, self._gradient(parameter), self.clock)
        return _Head.apply(chain, self.head_s, self.clock)

    def personal(self, rank: int) -> None:
        """Draw this rank's gradients: half of the variance is shared by all ranks, as with large batches."""
        size = max(parameter.numel() for parameter in self.parameters())
        shared, own = (torch.Generator().manual_seed(2**20 * self._seed + s) for s in (0, rank + 1))
        self._pool = torch.randn(size, generator=shared).add_(torch.randn(size, generator=own)).mul_(1e-3)

    def _gradient(self, parameter: Tensor) -> Tensor:
        if not len(self._pool):
            self.personal(0)
        return self._pool[: parameter.numel()].view(parameter.shape)


def _place(module: nn.Module, path: list[str], parameter: nn.Parameter) -> None:
    """Register `parameter` under its dotted name, so that rules and exemptions mean what they mean in the network."""
    *folders, name = path
    for folder in folders:
        if folder not in module._modules:
            module.add_module(folder, nn.Module())
        module = module._modules[folder]  # type: ignore[assignment]
    module.register_parameter(name, parameter)


class Still(torch.optim.Optimizer):
    """Changes nothing: the update is part of `compute_s`."""

    def __init__(self, parameters: Iterator[nn.Parameter]) -> None:
        super().__init__(parameters, {"lr": 0.0})

    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        return None


@dataclass(frozen=True)
class SyntheticTask:
    """Has the methods of `launch.experiments.tasks.Task` that a timed run uses; there is nothing to evaluate."""

    name: str
    compute_s: float
    batch: int = 1

    def optimizer(self, parameters: Iterator[nn.Parameter]) -> torch.optim.Optimizer:
        return Still(parameters)

    def model(self, seed: int) -> Synthetic:
        return Synthetic(load(self.name), self.compute_s, seed)

    def batches(self, rank: int, ranks: int, seed: int) -> Iterator[Batch]:
        empty = torch.zeros(())
        while True:
            yield Batch(empty, empty)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        return model(batch.inputs)
