"""Local directions: what momentum or Adam makes of this rank's own gradient, before anything is compressed.

Every rank keeps its own moments, and directions are averaged. Momentum is linear in the gradient, so with exact
averages nothing changes; the mean of the ranks' Adam directions is not the Adam direction of the mean gradient.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from ..._lazy import torch
from ...core.memory import finite, zero_unless
from .base import Betas, Decay, Direction, Eps, Run, once_in_a_step

if TYPE_CHECKING:
    from torch import Tensor

    from ...core.call import Call, Reduction


class Momentum(Direction):
    """m <- beta m + x; m is averaged. The direction of `torch.optim.SGD(momentum=beta)`."""

    moments: ClassVar[int] = 1

    kind: Literal["momentum"] = "momentum"
    momentum: Decay = Field(0.9, description="decay, as in torch.optim.SGD")

    def mean(self, x: Tensor, call: Call, run: Run) -> Reduction:
        once_in_a_step(call)
        healthy = finite(x)
        m = call.state.exchange("momentum")
        torch.mul(m.old, torch.where(healthy, self.momentum, 1.0), out=m.new).add_(zero_unless(healthy, x))
        torch.add(m.new, torch.where(healthy, 0.0, torch.nan), out=x)
        return (yield from run(x, False))


class Adam(Direction):
    """(m / (1 - beta1^t)) / (sqrt(v / (1 - beta2^t)) + eps) is averaged, the direction of `torch.optim.Adam` (Kingma &
    Ba, 2015, arXiv 1412.6980); t counts a tensor's steps with a finite gradient.
    """

    kind: Literal["adam"] = "adam"
    betas: Betas = Field((0.9, 0.999), description="decays, as in torch.optim.Adam")
    eps: Eps = Field(1e-8, description="as in torch.optim.Adam")

    def mean(self, x: Tensor, call: Call, run: Run) -> Reduction:
        once_in_a_step(call)
        healthy = finite(x)
        first, second = call.state.exchange("adam_m"), call.state.exchange("adam_v")
        gradient = zero_unless(healthy, x)
        m = torch.mul(first.old, torch.where(healthy, self.betas[0], 1.0), out=first.new)
        m.add_(gradient, alpha=1 - self.betas[0])
        v = torch.mul(second.old, torch.where(healthy, self.betas[1], 1.0), out=second.new)
        v.addcmul_(gradient, gradient, value=1 - self.betas[1])
        steps = _counts(healthy, call)
        unbias_m, unbias_v = ((1 - beta**steps).float() for beta in self.betas)
        pieces = list(torch.sqrt(v, out=x).split([segment.numel for segment in call.segments]))
        torch._foreach_div_(pieces, list(unbias_v.sqrt()))
        torch.div(m, x.add_(self.eps), out=x)
        torch._foreach_div_(pieces, list(torch.where(healthy, unbias_m, torch.nan)))
        return (yield from run(x, False))


def _counts(healthy: Tensor, call: Call) -> Tensor:
    """Finite gradients that each tensor has seen, this one included; fp64 [segments]. Absent tensors have seen none.

    A tensor may lie in several buckets, so beside the count stands the step (plus one) at which it last grew.
    """
    clocks = [
        call.state.tensor(
            "adam_clock", segment.name, lambda: torch.zeros(2, dtype=torch.float64, device=healthy.device)
        )
        for segment in call.segments
    ]
    here = torch.tensor([segment.name not in call.absent for segment in call.segments], device=healthy.device)
    table = torch.stack(clocks)
    count, last = table.unbind(1)
    now = call.clock.step + 1
    grows = healthy & here
    count.add_(grows & (last != now))
    last.copy_(torch.where(grows, now, last))
    torch._foreach_copy_(clocks, list(table))
    return count.clamp(min=1)
