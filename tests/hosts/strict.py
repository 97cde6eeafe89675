"""What is looked at beside the reduction, on every host; imported by the scripts of the three hosts.

A host is an object with `rank`, `model` (what is called), `mean(tensor)`, and `train(loss)`, which takes one optimizer
step with the loss that `loss()` gives.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from compression_plugins.engine.health import NonFiniteError
from compression_plugins.errors import MismatchError

LR = 0.01
TOPK = {"scheme": "topk", "ratio": 4, "min_numel": 0}
Make = Callable[[dict[str, Any]], Any]


def network() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(12, 40), nn.Tanh(), nn.Linear(40, 8))


def loss_of(host: Any, step: int, ill: bool = False) -> Tensor:
    x = torch.randn(16, 12, generator=torch.Generator().manual_seed(100 * step + host.rank))
    loss = host.model(x).square().mean()
    return loss * torch.nan if ill and host.rank == 1 else loss


def train(host: Any, steps: list[int], ill: int = -1) -> None:
    for step in steps:
        host.train(lambda step=step: loss_of(host, step, step == ill))


def own(host: Any) -> Tensor:
    return torch.cat([p.detach().reshape(-1).clone().float() for p in host.model.parameters()])


def spread(host: Any) -> float:
    """Largest distance of any rank's parameters from the mean, on any rank."""
    return float(host.mean((own(host) - host.mean(own(host))).abs().max().view(1)))


def skipped(make: Make, **options: Any) -> dict[str, Any]:
    """A step with a NaN on rank 1 is as if it had not been: moments, weights, memory."""
    host, other = make({**TOPK, "on_nonfinite": "skip"}, **options), make(TOPK, **options)
    train(host, [0, 1, 2, 3, 4], ill=2)
    train(other, [0, 1, 3, 4])
    ends = own(host)
    return {"as without it": bool(torch.equal(ends, own(other))), "finite": bool(ends.isfinite().all())}


def raised(make: Make) -> str:
    host = make({**TOPK, "on_nonfinite": "raise"})
    try:
        train(host, [0, 1, 2], ill=2)
    except NonFiniteError as error:
        return str(error)
    return "nothing was raised"


def verified(make: Make) -> bool:
    """Checksums change no bit."""
    hosts = [make({**TOPK, "verify": verify}) for verify in (False, True)]
    for host in hosts:
        train(host, [0, 1, 2])
    return bool(torch.equal(own(hosts[0]), own(hosts[1])))


def compared(make: Make) -> dict[str, Any]:
    host = make({**TOPK, "check_every": 2})
    train(host, [0, 1, 2])
    if host.rank == 1:
        with torch.no_grad():
            list(host.model.parameters())[2].view(-1)[5] += 1e-3
    try:
        train(host, [3])
    except MismatchError as error:
        return {"told": str(error)}
    return {"told": "nothing was raised"}
