"""Data-parallel training with any number of workers in one process: one reducer a worker, and one model for all, or one
each where workers train by themselves between exchanges.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from compression_plugins.bench.ranks import Ranks
from compression_plugins.config import Config
from compression_plugins.engine.exchange import UpdateExchange
from compression_plugins.engine.plan import Plan, TensorSpec, make_plan
from compression_plugins.engine.reducer import Reducer
from compression_plugins.optimizer.local_updates import LocalUpdates, Outer
from compression_plugins.transports.local import drive


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
        self.parameters = _trained(model)
        self.plan = _plan(config, self.parameters)
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
            gradients.append(_flat(self.plan, self.parameters))
        return total / self.workers, gradients

    def apply(self, gradients: list[list[Tensor]]) -> None:
        """Average `gradients[rank][bucket]` (flat fp32, overwritten) and let the optimizer take its step."""
        means = self.ranks.average(self.plan.buckets, gradients)
        _take(self.plan, self.parameters, means)
        self.optimizer.step()
        self.ranks.end_step()

    def memory(self, rank: int) -> Tensor:
        """What the rank's residuals hold, flat, in the order of the plan's buckets; dense buckets have none."""
        return torch.cat(
            [self.ranks.reducers[rank].state.kept(b) for b in self.plan.buckets if b.scheme.memory is not None]
        )

    @property
    def optimizers(self) -> list[torch.optim.Optimizer]:
        return [self.optimizer]

    def finish(self) -> None:
        """Training is over; nothing is owed to the model."""

    @property
    def sent(self) -> list[float]:
        """Bytes of payload that each rank has sent."""
        return self.ranks.sent


class LocalCluster:
    """`workers` ranks with a replica and an optimizer each, which exchange what they have learned (`every` above 1).

    Args:
        model: makes one replica, the same at each call.
        optimizer: makes the optimizer of a replica's parameters.
        config: of the exchange; during its dense warm-up gradients are averaged in every step.
    """

    def __init__(
        self,
        model: Callable[[], nn.Module],
        optimizer: Callable[[Iterator[nn.Parameter]], torch.optim.Optimizer],
        config: Config,
        workers: int,
    ) -> None:
        self.ranks = Ranks(config, workers)
        self.replicas = [_Replica(model(), optimizer, config, reducer) for reducer in self.ranks.reducers]
        self.plan = self.replicas[0].plan

    @property
    def optimizers(self) -> list[torch.optim.Optimizer]:
        return [replica.optimizer for replica in self.replicas]

    @property
    def model(self) -> nn.Module:
        """Rank 0's; all are equal after an exchange."""
        return self.replicas[0].model

    def step(self, loss: Callable[[nn.Module, int], Tensor]) -> float:
        """One optimizer step of every rank; `loss(model, rank)` is the loss of that rank's batch. Returns the mean."""
        total = sum(replica.backward(loss, rank) for rank, replica in enumerate(self.replicas))
        reducer = self.ranks.reducers[0]
        if not reducer.local:
            gradients = [_flat(self.plan, replica.parameters) for replica in self.replicas]
            means = self.ranks.average(self.plan.buckets, gradients)
            for replica in self.replicas:
                _take(self.plan, replica.parameters, means)
        for replica in self.replicas:
            replica.optimizer.step()
            replica.updates.after_step(reducer.step)
        if reducer.round_ends:
            self._meet()
        self.ranks.end_step()
        return total / len(self.replicas)

    def finish(self) -> None:
        """Training is over: exchange what a last, partial round has learned."""
        reducer = self.ranks.reducers[0]
        since = reducer.step - reducer.config.warmup_steps
        if since > 0 and since % reducer.config.every:
            self._meet()

    @property
    def sent(self) -> list[float]:
        """Bytes of payload that each rank has sent."""
        return self.ranks.sent

    def _meet(self) -> None:
        drive([work for replica in self.replicas for work in replica.updates.start_exchange(replica.optimizer)])
        for replica in self.replicas:
            replica.updates.finish_exchange()


class _Replica:
    """What a worker has of its own; the `Owner` of its exchange."""

    started = True

    def __init__(
        self,
        model: nn.Module,
        optimizer: Callable[[Iterator[nn.Parameter]], torch.optim.Optimizer],
        config: Config,
        reducer: Reducer,
    ) -> None:
        self.model, self.optimizer = model, optimizer(model.parameters())
        self.config, self.reducer, self.parameters = config, reducer, _trained(model)
        self.plan = _plan(config, self.parameters)
        self.updates = LocalUpdates(Outer(**config.outer.model_dump()), self.parameters, _Together(self))

    def backward(self, loss: Callable[[nn.Module, int], Tensor], rank: int) -> float:
        self.updates.before_forward()
        self.optimizer.zero_grad(set_to_none=False)
        value = loss(self.model, rank)
        value.backward()
        self.updates.after_backward()
        return value.item()


class _Together(UpdateExchange):
    """An exchange that no rank begins by itself: in one process a rank that waits for the others waits for ever."""

    def due(self) -> bool:
        return False


def _trained(model: nn.Module) -> dict[str, Tensor]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def _plan(config: Config, parameters: Mapping[str, Tensor]) -> Plan:
    return make_plan(config, [TensorSpec(name, tuple(p.shape), "float32") for name, p in parameters.items()])


def _flat(plan: Plan, parameters: Mapping[str, Tensor]) -> list[Tensor]:
    """The gradients of `parameters`, flat, one tensor a bucket; zeros where there is none."""
    return [torch.cat([_gradient(parameters[s.name]).reshape(-1) for s in bucket.segments]) for bucket in plan.buckets]


def _gradient(parameter: Tensor) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


def _take(plan: Plan, parameters: Mapping[str, Tensor], means: Sequence[Tensor]) -> None:
    """Every parameter's gradient becomes its part of the means, one a bucket."""
    for bucket, mean in zip(plan.buckets, means):
        pieces = mean.split([segment.numel for segment in bucket.segments])
        for segment, piece in zip(bucket.segments, pieces):
            parameter = parameters[segment.name]
            parameter.grad = piece.view_as(parameter).clone()
