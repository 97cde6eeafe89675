"""Local directions: what momentum or Adam makes of this rank's own gradient, before anything is compressed.

Methods that compress *updates* put the optimizer before the wire: every rank keeps its own moments, directions are
averaged, and the training script applies the average with plain SGD. Momentum is linear in the gradient, so with exact
averages nothing changes; the mean of the ranks' Adam directions is not the Adam direction of the mean gradient.

Moments are fp32, live in the reducer's state beside the residual, and are saved, moved and taken back like it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .errors import UnsupportedError
from .memories import zero_unless

if TYPE_CHECKING:
    from torch import Tensor

    from .schemes.base import Call


def momentum(x: Tensor, healthy: Tensor, call: Call, beta: float) -> None:
    """m <- beta m + x; x <- m. The direction of `torch.optim.SGD(momentum=beta)`.

    Args:
        x: flat fp32 gradient of the bucket, overwritten.
        healthy: bool scalar, whether x is finite. If not, m stays as it was and x becomes NaN.

    Raises:
        UnsupportedError: the host reduces more than once in a step.
    """
    import torch

    _once_a_step(call)
    m = call.vector("momentum")
    m.mul_(torch.where(healthy, beta, 1.0)).add_(zero_unless(healthy, x))
    torch.add(m, torch.where(healthy, 0.0, torch.nan), out=x)


def adam(x: Tensor, healthy: Tensor, call: Call, betas: tuple[float, float], eps: float) -> None:
    """x <- (m / (1 - beta1^t)) / (sqrt(v / (1 - beta2^t)) + eps), the direction of `torch.optim.Adam` (Kingma & Ba,
    2015, arXiv 1412.6980); t counts a tensor's steps with a finite gradient.

    Arguments and errors as in `momentum`.
    """
    import torch

    _once_a_step(call)
    m, v = call.vector("adam_m"), call.vector("adam_v")
    gradient = zero_unless(healthy, x)
    m.mul_(torch.where(healthy, betas[0], 1.0)).add_(gradient, alpha=1 - betas[0])
    v.mul_(torch.where(healthy, betas[1], 1.0)).addcmul_(gradient, gradient, value=1 - betas[1])
    steps = _counts(healthy, call)
    first, second = ((1 - beta**steps).float() for beta in betas)
    pieces = list(torch.sqrt(v, out=x).split([segment.numel for segment in call.segments]))
    torch._foreach_div_(pieces, list(second.sqrt()))
    torch.div(m, x.add_(eps), out=x)
    torch._foreach_div_(pieces, list(torch.where(healthy, first, torch.nan)))


def _counts(healthy: Tensor, call: Call) -> Tensor:
    """Finite gradients that each tensor has seen, this one included; fp64 [segments].

    A tensor may lie in several buckets, so beside the count stands the step (plus one) at which it last grew.
    """
    import torch

    clocks = [
        call.state("adam_clock", segment.name, lambda: torch.zeros(2, dtype=torch.float64, device=healthy.device))
        for segment in call.segments
    ]
    table = torch.stack(clocks)
    count, last = table.unbind(1)
    now = call.step + 1
    count.add_(healthy & (last != now))
    last.copy_(torch.where(healthy, now, last))
    torch._foreach_copy_(clocks, list(table))
    return count


def _once_a_step(call: Call) -> None:
    if call.key.stream:
        raise UnsupportedError(
            "a local direction (momentum, adam) takes one gradient a step, but this host reduces every micro-batch: "
            "with DeepSpeed and gradient accumulation use ZeRO stage 0 or 1; else direction: gradient"
        )
