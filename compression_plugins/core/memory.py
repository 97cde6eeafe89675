"""Error memory: what was not sent is remembered and added to the next gradient.

Three numbers cover the published methods::

    p = g + alpha * r          what is compressed
    q = decode(encode(p))      what was sent
    r = decay * r + g - sent * q

Error feedback (Seide 2014; Karimireddy et al. 2019, arXiv 1901.09847) is (1, 1, 1). ScaleCom's low-pass filter (Chen et
al. 2020, arXiv 2104.11125), written for r = m / beta, is (beta, 1, 1). ECQ-SGD (arXiv 1806.08054) is (alpha, beta, 1).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from .._lazy import torch

if TYPE_CHECKING:
    from torch import Tensor


class Vector(NamedTuple):
    """One fp32 value for each element of a bucket, before a reduction and after it.

    Attributes:
        old: to be read only, unless it is `new`.
        new: every element is to be written; the same tensor as `old` when the step has reduced this bucket before.
    """

    old: Tensor
    new: Tensor

    def arguments(self) -> dict[str, Any]:
        """Keyword arguments of a kernel that reads `old` and writes `new`."""
        return {"residual": self.old, "updated": self.new}

    def part(self, start: int, stop: int) -> Vector:
        """Views of elements [start, stop) of both."""
        return Vector(self.old[start:stop], self.new[start:stop])


@dataclass(frozen=True)
class Memory:
    """The law of a residual memory; the state itself, one fp32 value for each element, lives in the reducer."""

    alpha: float = 1.0
    decay: float = 1.0
    sent: float = 1.0

    def kernel_arguments(self, residual: Vector) -> dict[str, Any]:
        """Keyword arguments of a fused encode kernel, which reads `residual.old` and writes `residual.new`."""
        return {**residual.arguments(), "alpha": self.alpha, "decay": self.decay, "sent": self.sent}

    def compensate(self, gradient: Tensor, residual: Vector) -> Tensor:
        """p = g + alpha * r, a new fp32 tensor, for methods that no fused kernel covers."""
        return gradient.add(residual.old, alpha=self.alpha)

    def update(self, gradient: Tensor, residual: Vector, decoded: Tensor) -> None:
        """r <- decay * r + g - sent * q; a non-finite gradient leaves the residual as it was."""
        new = gradient.add(residual.old, alpha=self.decay).sub_(decoded, alpha=self.sent)
        residual.new.copy_(new.where(finite(new), residual.old))


ERROR_FEEDBACK = Memory()


def zero_unless(healthy: Tensor, x: Tensor) -> Tensor:
    """`x`, or zeros where the bool scalar `healthy` is false: a branch on CPU, where it is free; none on a GPU."""
    if x.is_cpu:
        return x if healthy else x.new_zeros(x.shape)
    return x.where(healthy, 0)


def nan_unless(healthy: Tensor, x: Tensor) -> Tensor:
    """`x`, in place: what it was, or NaN everywhere where the bool scalar `healthy` is false. Branches as above."""
    if x.is_cpu:
        return x if healthy else x.fill_(float("nan"))
    return x.masked_fill_(~healthy, float("nan"))


def restore_unless(healthy: Tensor, vector: Vector) -> None:
    """Where the bool scalar `healthy` is false, `vector.new` becomes `vector.old`. Branches as above."""
    if not vector.new.is_cpu:
        torch.where(healthy, vector.new, vector.old, out=vector.new)
    elif not healthy:
        vector.new.copy_(vector.old)


def finite(x: Tensor) -> Tensor:
    """Whether every element of flat `x` is finite, in one pass; bool scalar on the device of `x`."""
    if not x.numel():
        return x.new_zeros(()).isfinite()
    low, high = x.aminmax()  # NaN if there is one
    return low.isfinite() & high.isfinite()
