"""Local directions: what momentum or Adam makes of this rank's own gradient, before anything is compressed.

Methods that compress *updates* put the optimizer before the wire: every rank keeps its own moments, directions are
averaged, and the training script applies the average with plain SGD. Momentum is linear in the gradient, so with exact
averages nothing changes; the mean of the ranks' Adam directions is not the Adam direction of the mean gradient.

Moments are fp32, live in the reducer's state beside the residual, and are saved, moved and taken back like it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from .._lazy import torch
from ..core.memory import zero_unless
from ..errors import UnsupportedError

if TYPE_CHECKING:
    from torch import Tensor

    from ..core.call import Call


class Direction(Protocol):
    """What a rank makes of its own gradient before any scheme sees it."""

    def apply(self, x: Tensor, healthy: Tensor, call: Call) -> None:
        """Replace flat fp32 `x`, this rank's gradient of a bucket, by its direction.

        Args:
            healthy: bool scalar, whether x is finite. If not, the moments stay as they were and x becomes NaN.

        Raises:
            UnsupportedError: the host reduces more than once in a step.
        """
        ...


@dataclass(frozen=True)
class Momentum:
    """m <- beta m + x; x <- m. The direction of `torch.optim.SGD(momentum=beta)`."""

    beta: float

    def apply(self, x: Tensor, healthy: Tensor, call: Call) -> None:
        _once_in_a_step(call)
        m = call.state.exchange("momentum")
        torch.mul(m.old, torch.where(healthy, self.beta, 1.0), out=m.new).add_(zero_unless(healthy, x))
        torch.add(m.new, torch.where(healthy, 0.0, torch.nan), out=x)


@dataclass(frozen=True)
class Adam:
    """x <- (m / (1 - beta1^t)) / (sqrt(v / (1 - beta2^t)) + eps), the direction of `torch.optim.Adam` (Kingma & Ba,
    2015, arXiv 1412.6980); t counts a tensor's steps with a finite gradient.
    """

    betas: tuple[float, float]
    eps: float

    def apply(self, x: Tensor, healthy: Tensor, call: Call) -> None:
        _once_in_a_step(call)
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


def _once_in_a_step(call: Call) -> None:
    if call.clock.micro_batch:
        raise UnsupportedError(
            "a local direction (momentum, adam) takes one gradient per step, but this host reduces every micro-batch: "
            "with DeepSpeed and gradient accumulation use ZeRO stage 0 or 1; else direction: gradient"
        )
