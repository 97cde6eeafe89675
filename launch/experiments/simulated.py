"""Data-parallel training with any number of workers in one process: one model, one reducer a worker."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from compression_plugins.bench.ranks import Ranks
from compression_plugins.config import Config
from compression_plugins.engine.plan import TensorSpec, make_plan


class Cluster:
    """`workers` ranks that train one replica of `model`, averaging gradients as `config` says.

    The ranks' replicas would be equal bit for bit, so one stands for all; memories and messages are each rank's own.
    The model side of double quantization is not simulated.

    Args:
        model: trained in place by `optimizer`, which owns its parameters.
        config: of the compression.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, config: Config, workers: int) -> None:
        self.model, self.optimizer, self.workers = model, optimizer, workers
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        specs = [TensorSpec(name, tuple(p.shape), "float32") for name, p in self.parameters.items()]
        self.plan = make_plan(config, specs)
        self.ranks = Ranks(config, workers)

    def step(self, loss: Callable[[nn.Module, int], Tensor]) -> float:
        """One optimizer step; `loss(model, rank)` is the loss of that rank's batch. Returns the mean loss."""
        mean, gradients = self.gradients(loss)
        self.apply(gradients)
        return mean

    def gradients(self, loss: Callable[[nn.Module, int], Tensor]) -> tuple[float, list[list[Tensor]]]:
        """(mean loss, `gradients[rank][bucket]`), flat fp32, for `apply`."""
        total, gradients = 0.0, []
        for rank in range(self.workers):
            self.optimizer.zero_grad(set_to_none=False)
            value = loss(self.model, rank)
            value.backward()
            total += value.item()
            gradients.append(self._flat())
        return total / self.workers, gradients

    def apply(self, gradients: list[list[Tensor]]) -> None:
        """Average `gradients[rank][bucket]` (flat fp32, overwritten) and let the optimizer take its step."""
        means = self.ranks.average(self.plan.buckets, gradients)
        with torch.no_grad():
            for bucket, mean in zip(self.plan.buckets, means):
                pieces = mean.split([segment.numel for segment in bucket.segments])
                for segment, piece in zip(bucket.segments, pieces):
                    parameter = self.parameters[segment.name]
                    parameter.grad = piece.view_as(parameter).clone()
        self.optimizer.step()
        self.ranks.end_step()

    def memory(self, rank: int) -> Tensor:
        """What the rank's residuals hold, flat, in the order of the plan's buckets; dense buckets have none."""
        return torch.cat(
            [self.ranks.reducers[rank].state.kept(b) for b in self.plan.buckets if b.scheme.memory is not None]
        )

    @property
    def sent(self) -> list[float]:
        """Bytes of payload that each rank has sent."""
        return self.ranks.sent

    def _flat(self) -> list[Tensor]:
        return [
            torch.cat([self._gradient(segment.name).reshape(-1) for segment in bucket.segments])
            for bucket in self.plan.buckets
        ]

    def _gradient(self, name: str) -> Tensor:
        parameter = self.parameters[name]
        return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
