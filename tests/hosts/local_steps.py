"""What must hold on every host where ranks train by themselves (`every`); imported by the scripts of the three hosts.

A host is an object with `rank`, `size`, `model` (what is called), `mean(tensor)`, `train(loss, accumulate)` which takes
one optimizer step with the losses that `loss(i)` gives, `norm(own)` by which it clips a rank's gradients, `sent()`
bytes, `save()`, `restore(saved)` and `finish()`.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

LR = 0.01


def network() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Embedding(32, 24), nn.Linear(24, 40), nn.Tanh(), nn.Linear(40, 32))


def loss_of(model: nn.Module, step: int, rank: int, micro: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(10_000 * step + 10 * rank + micro)
    x = torch.randint(32, (16,), generator=generator)
    return nn.functional.cross_entropy(model(x), (7 * x + rank) % 32)


class Oracle:
    """Plain local Adam, and means of gradients and weights where they are due."""

    def __init__(self, host: Any, every: int, warmup: int) -> None:
        self.host, self.every, self.warmup, self.steps = host, every, warmup, 0
        self.model = network()
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=LR)
        self.agreed = self.weights()

    def weights(self) -> Tensor:
        return torch.cat([p.detach().reshape(-1).clone() for p in self.model.parameters()])

    def train(self, accumulate: int = 1, clip: float = 0.0) -> None:
        self.optimizer.zero_grad()
        for micro in range(accumulate):
            (loss_of(self.model, self.steps, self.host.rank, micro) / accumulate).backward()
        if self.steps < self.warmup:
            for p in self.model.parameters():
                p.grad = self.host.mean(p.grad)
        if clip:
            norm = self.host.norm(nn.utils.get_total_norm([p.grad for p in self.model.parameters()]))
            nn.utils.clip_grads_with_norm_(self.model.parameters(), clip, norm)
        self.optimizer.step()
        self.steps += 1
        local = self.steps - self.warmup
        if local > 0 and local % self.every == 0:
            with torch.no_grad():
                for p in self.model.parameters():
                    p.copy_(self.host.mean(p))
        if local <= 0 or local % self.every == 0:
            self.agreed = self.weights()


def own(model: nn.Module) -> Tensor:
    """What the parameters hold."""
    return torch.cat([p.detach().reshape(-1).clone() for p in model.parameters()])


def shown(model: nn.Module) -> Tensor:
    """What an evaluation computes."""
    model.eval()
    with torch.no_grad():
        result = model(torch.arange(32))
    model.train()
    return result


def spread(host: Any, x: Tensor) -> float:
    """Largest distance of any rank's `x` from the mean."""
    return float((host.mean((x - host.mean(x)).abs().max().view(1)) > 0).float())


def exact(make: Callable[..., Any], accumulate: int = 1, clip: float = 0.0) -> dict[str, Any]:
    """Without compression it is plain local training; evaluations see what all ranks agreed on last."""
    host = make({"scheme": "none", "min_numel": 0, "every": 3, "warmup_steps": 2}, accumulate)
    oracle, report = Oracle(host, 3, 2), []
    judge = network()
    for step in range(11):
        host.train(lambda micro, step=step: loss_of(host.model, step, host.rank, micro), accumulate, clip)
        oracle.train(accumulate, clip)
        nn.utils.vector_to_parameters(oracle.agreed, judge.parameters())
        before = own(host.model)
        report.append({
            "off": float((before - oracle.weights()).abs().max()),
            "equal": not spread(host, before),
            "read off": float((shown(host.model) - shown(judge)).abs().max()),
            "read equal": not spread(host, shown(host.model)),
            "saved off": float((own_of(host.model.state_dict()) - oracle.agreed).abs().max()),
        })  # fmt: skip
    return {"steps": report}


def own_of(state: dict[str, Tensor]) -> Tensor:
    return torch.cat([value.reshape(-1).clone() for value in state.values()])


def compressed(make: Callable[..., Any]) -> dict[str, Any]:
    """Replicas are equal after every exchange, and after the last, partial round when the script says so."""
    host = make({"scheme": "ef_signsgd", "block": 32, "min_numel": 0, "every": 4})
    equal, losses = [], []
    for step in range(30):
        host.train(lambda micro, step=step: loss_of(host.model, step, host.rank, micro))
        losses.append(float(host.mean(loss_of(host.model, step, host.rank).detach().view(1))))
        equal.append(not spread(host, own(host.model)))
    host.finish()
    return {"equal": equal, "finished": not spread(host, own(host.model)), "losses": losses, "sent": host.sent()}


def moments(make: Callable[..., Any]) -> dict[str, Any]:
    """Averaged at an exchange where the configuration says so."""
    found = {}
    for word in ("local", "mean"):
        host = make({"scheme": "ef_signsgd", "block": 32, "min_numel": 0, "every": 2, "outer": {"moments": word}})
        for step in range(4):
            host.train(lambda micro, step=step, host=host: loss_of(host.model, step, host.rank, micro))
        states = host.optimizer_state()
        kept = torch.cat(
            [states[p][key].reshape(-1) for p in host.model.parameters() for key in ("exp_avg", "exp_avg_sq")]
        )
        found[word] = not spread(host, kept)
    return found


def partly(make: Callable[..., Any], pickles: bool = True) -> dict[str, Any]:
    """A part of the model that is evaluated or saved by itself shows what all ranks agreed on; a model can be saved
    whole where the host allows it.
    """
    host = make({"scheme": "ef_signsgd", "block": 32, "min_numel": 0, "every": 4})
    for step in range(6):
        host.train(lambda micro, step=step: loss_of(host.model, step, host.rank, micro))
    part = getattr(host.model, "module", host.model)[1]
    part.eval()
    with torch.no_grad():
        evaluated = part(torch.ones(1, 24))
    part.train()
    host.train(lambda micro: loss_of(host.model, 6, host.rank, micro))
    saved = own_of(part.state_dict())
    if pickles:
        torch.save(getattr(host.model, "module", host.model), io.BytesIO())
    return {"evaluated": not spread(host, evaluated), "saved": not spread(host, saved)}


def resumed(make: Callable[..., Any]) -> dict[str, Any]:
    """Saved in the middle of a round, training goes on bit for bit."""
    config = {"scheme": "ef_signsgd", "block": 32, "min_numel": 0, "every": 4, "outer": {"lr": 0.9, "momentum": 0.2}}
    host, saved = make(config), None
    for step in range(12):
        if step == 6:
            saved = host.save()
        host.train(lambda micro, step=step: loss_of(host.model, step, host.rank, micro))
    again = make(config)
    again.restore(saved)
    for step in range(6, 12):
        again.train(lambda micro, step=step: loss_of(again.model, step, again.rank, micro))
    return {"same": bool(torch.equal(own(host.model), own(again.model)))}
