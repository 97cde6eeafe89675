"""Ranks that train by themselves, in one process."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from compression_plugins.config import Config
from compression_plugins.engine.session import Session
from compression_plugins.optimizer.local_updates import LocalUpdates
from compression_plugins.transports.local import LocalWorld, drive
from tests.world import SHORT

RANKS = 4


def net(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(20, 40), nn.Tanh(), nn.Linear(40, 3)).to(dtype)


class Cluster:
    """Ranks with a replica, an optimizer and a session each; `step` is one optimizer step of all."""

    def __init__(
        self,
        scheme: str = "none",
        ranks: int = RANKS,
        optimizer: Callable[[Iterator[nn.Parameter]], torch.optim.Optimizer] = lambda p: torch.optim.Adam(p, lr=0.01),
        dtype: torch.dtype = torch.float32,
        **settings: Any,
    ) -> None:
        config = Config.load({"scheme": scheme, "min_numel": 0, "every": 4, **SHORT.get(scheme, {}), **settings})
        self.models = [net(dtype) for _ in range(ranks)]
        self.optimizers = [optimizer(model.parameters()) for model in self.models]
        self.sessions = [Session("test", config, dict(model.named_parameters())) for model in self.models]
        for session, transport in zip(self.sessions, LocalWorld(ranks).transports):
            session.make_hooks()
            session.start(transport)
        self.steps = 0

    @property
    def hooks(self) -> list[LocalUpdates]:
        return [hook for session in self.sessions for hook in session.hooks if isinstance(hook, LocalUpdates)]

    def gradients(self, rank: int) -> None:
        model, session = self.models[rank], self.sessions[rank]
        generator = torch.Generator().manual_seed(1000 * self.steps + rank)
        dtype = next(model.parameters()).dtype
        x = torch.randn(8, 20, generator=generator).to(dtype)
        y = torch.randint(3, (8,), generator=generator)
        session.before_forward()
        self.optimizers[rank].zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        session.after_backward()

    def step(
        self,
        edit: Callable[[nn.Module], None] | None = None,
        at_exchange: Callable[[LocalUpdates], None] | None = None,
    ) -> None:
        for rank in range(len(self.models)):
            self.gradients(rank)
        if not self.sessions[0].reducer.local:
            self.average_gradients()
        due, works = self.sessions[0].reducer.round_ends, list[Any]()
        for model, optimizer, session, hook in zip(self.models, self.optimizers, self.sessions, self.hooks):
            if edit is not None:
                edit(model)
            session.after_backward()
            optimizer.step()
            hook.stepped()
            if due and at_exchange is not None:
                at_exchange(hook)
            if due:
                works += hook.start_exchange(optimizer)
        if due:
            drive(works)
            for hook in self.hooks:
                hook.finish_exchange()
        for session in self.sessions:
            session.reducer.end_step()
        self.steps += 1

    def average_gradients(self) -> None:
        for parameters in zip(*(model.parameters() for model in self.models)):
            mean = torch.stack([p.grad for p in parameters]).mean(0)
            for p in parameters:
                p.grad = mean.clone()

    def weights(self, rank: int) -> list[Tensor]:
        return [p.detach().clone() for p in self.models[rank].parameters()]


def own(hook: LocalUpdates) -> list[Tensor]:
    return [p.detach().clone() for p in hook._parameters.values()]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b))


def no_first_row(model: nn.Module) -> None:
    with torch.no_grad():
        next(model.parameters())[0].zero_()
