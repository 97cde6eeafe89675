"""1-bit LAMB as a direction: a frozen variance, and a trust ratio for every tensor."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from ..._lazy import torch
from ...errors import ConfigError, UnsupportedError
from .base import Decay
from .shared import FrozenAdam, pieces_of

if TYPE_CHECKING:
    from torch import Tensor

    from ...core.call import Call
    from ...core.memory import Vector

#: Of each tensor: the average of its trust ratio in the warm-up, and the last factor less one.
_SLOTS = ("lamb_coeff", "lamb_change")

Positive = Annotated[float, Field(gt=0, le=1e6)]


class FrozenLamb(FrozenAdam):
    """1-bit LAMB (Li et al., 2021, arXiv 2104.06069): LAMB (You et al., 2019, arXiv 1904.00962) in the dense warm-up,
    then a frozen variance, and a trust ratio that is its average from the warm-up times a factor.

    The direction is that of `frozen_adam`, plus `weight_decay` times the weights, times the ratio. The factor is the
    largest quotient of the frozen to a fresh root of v, the fresh one made of the gradients that the averages of m
    stand for; it is kept in [factor_min, factor_max], and within `factor_threshold` of the last. Before m travels every
    tensor is scaled to the mean size of those in its bucket, so that tensors that share a scale of the code lose alike.

    Departures from the paper: those of `frozen_adam`; sizes are made equal within a bucket, not over the model; what
    has no variance has no part in the factor. The published code has `bias_correction` off, here it is on.
    """

    moments: ClassVar[int] = 3

    kind: Literal["frozen_lamb"] = "frozen_lamb"  # type: ignore[assignment]
    weight_decay: Annotated[float, Field(ge=0, le=10)] = Field(
        0.0, description="added to the direction before its norm"
    )
    max_coeff: Positive = Field(10.0, description="upper bound of the trust ratio in the warm-up")
    min_coeff: Positive = Field(0.01, description="lower bound of it")
    coeff_beta: Decay = Field(0.9, description="decay of its average in the warm-up")
    factor_max: Positive = Field(4.0, description="upper bound of what that average is multiplied by later")
    factor_min: Positive = Field(0.5, description="lower bound of it")
    factor_threshold: Positive = Field(0.1, description="part by which it may change in a step")

    def check(self, warmup_steps: int) -> None:
        super().check(warmup_steps)
        for low, high in (("min_coeff", "max_coeff"), ("factor_min", "factor_max")):
            if getattr(self, low) > getattr(self, high):
                raise ConfigError(f"direction: frozen_lamb: {low} is above {high}")

    def _scales(self, m: Tensor, call: Call) -> list[Tensor]:
        sizes = torch.stack([_norm(piece) / piece.numel() ** 0.5 for piece in pieces_of(m, call)])
        live = sizes > 0
        scales = torch.where(live, sizes.sum() / live.sum().clamp(min=1) / sizes, 1.0)
        made = zip(call.segments, scales.unbind())
        return [call.state.tensor("lamb_scale", segment.name, scale.clone) for segment, scale in made]

    def _finish(
        self, direction: Tensor, call: Call, first: Vector, second: Vector, healthy: Tensor, unbias_v: Tensor
    ) -> None:
        weights = self._weights(call)
        fresh = call.state.exchange("lamb_fresh")
        updates, warming = pieces_of(direction, call), call.clock.round < 0
        plain = torch.stack([_norm(update) for update in updates])
        direction.add_(weights, alpha=self.weight_decay)
        norms = torch.stack([_norm(update) for update in updates])
        coefficients, changes = (
            [self._number(call, slot, s.name, direction) for s in call.segments] for slot in _SLOTS
        )
        average, last = torch.stack(coefficients), 1 + torch.stack(changes)
        if warming:
            sizes = torch.stack([_norm(piece) for piece in pieces_of(weights, call)])
            ratios = (sizes / norms).clamp(self.min_coeff, self.max_coeff)
            ratio = torch.where((sizes != 0) & (norms != 0), ratios, 1.0)
            kept = torch.where(ratio != 1, self.coeff_beta * average + (1 - self.coeff_beta) * ratio, average)
            torch._foreach_copy_(coefficients, list(torch.where(healthy, kept, average)))
            fresh.new.copy_(second.new)
        else:
            factor = self._factors(call, first, second, fresh, healthy, unbias_v)
            if self.weight_decay:
                share = (plain / norms).clamp(max=1.0).nan_to_num(1.0)
                factor = factor * share + 1 - share
            factor = factor.clamp(self.factor_min, self.factor_max)
            room = self.factor_threshold
            factor = torch.minimum(torch.maximum(factor, last * (1 - room)), last * (1 + room))
            torch._foreach_copy_(changes, list(torch.where(healthy, factor, last) - 1))
            ratio = average * factor
        torch._foreach_mul_(updates, list(ratio))

    def _factors(
        self, call: Call, first: Vector, second: Vector, fresh: Vector, healthy: Tensor, unbias_v: Tensor
    ) -> Tensor:
        """The largest quotient of the roots, of each tensor, fp32 [segments]; and the fresh v is brought up to date."""
        beta1, beta2 = self.betas
        gradient = first.new.sub(first.old, alpha=beta1).div_(1 - beta1)
        torch.mul(fresh.old, torch.where(healthy, beta2, 1.0), out=fresh.new)
        fresh.new.addcmul_(gradient.mul_(healthy), gradient, value=1 - beta2)
        roots = [torch.sqrt(v) for v in (second.new, fresh.new)]
        for root in roots:
            torch._foreach_div_(pieces_of(root, call), list(unbias_v.sqrt()))
            root.add_(self.eps)
        quotients = roots[0].div_(roots[1]).mul_(second.new > 0)
        return torch.stack([piece.max() for piece in pieces_of(quotients, call)])

    def _weights(self, call: Call) -> Tensor:
        if call.weights is None or any(segment.shape is None for segment in call.segments):
            raise UnsupportedError(
                "direction: frozen_lamb needs the weights of whole tensors, which this host does not show: use "
                "direction: frozen_adam"
            )
        return call.weights()

    def _number(self, call: Call, slot: str, name: str, like: Tensor) -> Tensor:
        return call.state.tensor(slot, name, lambda: torch.zeros((), device=like.device))


def _norm(x: Tensor) -> Tensor:
    """Summed in fp64, so that ranks with other numbers of threads find the same fp32."""
    return torch.linalg.vector_norm(x, dtype=torch.float64).float()
