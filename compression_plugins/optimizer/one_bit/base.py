"""What the three optimizers have in common: phases, masks, and the ranks that they average over."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, Protocol

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from ...errors import ConfigError, UnsupportedError

Group = dict[str, Any]


class Ranks(Protocol):
    """The ranks as an optimizer sees them."""

    def mean(self, vectors: Mapping[Tensor, Tensor], role: Literal["gradient", "update"]) -> None:
        """Replace the vector of every parameter by its mean over ranks, as a scheme codes it, with its memory.

        Args:
            vectors: parameter -> tensor of its shape; the same parameters on every rank.
            role: what they are; each has a memory of its own.
        """
        ...

    def average_gradients(self, on: bool) -> None:
        """Whether the host averages the gradients of the next step, exactly, or leaves each rank its own."""
        ...


class OneBit(torch.optim.Optimizer):
    """Base of the three. State of a parameter: `step`, fp32 `exp_avg` (m) and `exp_avg_sq` (v), and what each adds.

    A group may have `exp_avg_mask`, a tensor of zeros and ones that m is multiplied by after each coded average. It is
    the script's: checkpoints neither save nor change it.

    Args:
        params: as for every torch optimizer.
        defaults: of a group.
        amsgrad: must be False.
        eps_inside_sqrt: has never had an effect.

    Raises:
        ConfigError: a value is out of range.
        UnsupportedError: `amsgrad`.

    Attributes:
        steps: that have been taken.
    """

    def __init__(
        self, params: Iterable[Any], defaults: dict[str, Any], amsgrad: bool = False, eps_inside_sqrt: bool = False
    ) -> None:
        name = type(self).__name__
        if amsgrad:
            raise UnsupportedError(f"{name} has no AMSGrad variant: set amsgrad to false")
        betas, lr, eps = defaults["betas"], defaults["lr"], defaults["eps"]
        if not (len(betas) == 2 and all(0 <= beta < 1 for beta in betas)):
            raise ConfigError(f"{name}: betas must be two numbers from 0 to below 1, not {betas!r}")
        if lr < 0 or eps < 0 or defaults["weight_decay"] < 0:
            raise ConfigError(f"{name}: lr, eps and weight_decay must not be negative")
        super().__init__(params, {**defaults, "betas": tuple(betas)})
        self.eps_inside_sqrt = eps_inside_sqrt
        self.steps = 0
        self._ranks: Ranks | None = None

    def bind(self, ranks: Ranks) -> None:
        """Average over `ranks` from now on. Without this a rank is alone."""
        self._ranks = ranks
        self._tell()

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step, from gradients that are averages while `average_gradients` is on, and this rank's own else."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.steps += 1
        self._take()
        self._tell()
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch does; masks stay those of the script."""
        masks = [group.get("exp_avg_mask") for group in self.param_groups]
        super().load_state_dict(state_dict)
        for group, mask in zip(self.param_groups, masks):
            group.pop("exp_avg_mask", None)
            if mask is not None:
                group["exp_avg_mask"] = mask
        self.steps = max((int(state["step"]) for state in self.state.values() if "step" in state), default=0)
        self._loaded()
        self._tell()

    # -- what each has

    def _take(self) -> None:
        """Step number `self.steps`, which begins with 1."""
        raise NotImplementedError

    def _averages(self) -> bool:
        """Whether the gradients of the step after this one are to be averaged."""
        raise NotImplementedError

    def _loaded(self) -> None:
        """The state has been loaded."""

    # -- what they share

    def _tell(self) -> None:
        if self._ranks is not None:
            self._ranks.average_gradients(self._averages())

    def _mean(self, vectors: Mapping[Tensor, Tensor], role: Literal["gradient", "update"]) -> None:
        if self._ranks is not None:
            self._ranks.mean(vectors, role)

    def _live(self, group: Group, absent: bool = False) -> list[Tensor]:
        """Parameters of `group` with a gradient; with `absent` also those that learn and have none in this step."""
        live = [p for p in group["params"] if p.grad is not None or (absent and p.requires_grad)]
        for p in live:
            state = self.state[p]
            if "step" not in state:
                state["step"] = torch.zeros((), dtype=torch.float32)
                state["exp_avg"] = torch.zeros_like(p, memory_format=torch.preserve_format)
                state["exp_avg_sq"] = torch.zeros_like(p, memory_format=torch.preserve_format)
        return live

    def _of(self, live: list[Tensor], key: str) -> list[Tensor]:
        return [self.state[p][key] for p in live]

    def _count(self, live: list[Tensor]) -> None:
        for step in self._of(live, "step"):
            step += 1

    def _add_to_m(self, live: list[Tensor], gradients: list[Tensor], beta: float) -> list[Tensor]:
        """m <- beta m + (1 - beta) g, of all m that are returned."""
        m = self._of(live, "exp_avg")
        if m:
            torch._foreach_mul_(m, beta)
            torch._foreach_add_(m, gradients, alpha=1 - beta)
        return m

    def _add_to_v(self, live: list[Tensor], gradients: list[Tensor], beta: float) -> list[Tensor]:
        """v <- beta v + (1 - beta) g^2, of all v that are returned."""
        v = self._of(live, "exp_avg_sq")
        if v:
            torch._foreach_mul_(v, beta)
            torch._foreach_addcmul_(v, gradients, gradients, value=1 - beta)
        return v

    def _adamw(self, group: Group, live: list[Tensor]) -> None:
        """torch's own step."""
        if live:
            adamw(
                *(live, gradients(live), self._of(live, "exp_avg"), self._of(live, "exp_avg_sq"), []),
                self._of(live, "step"),
                amsgrad=False,
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                lr=group["lr"],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                maximize=False,
            )

    def _masked(self, group: Group, vectors: list[Tensor]) -> list[Tensor]:
        mask = group.get("exp_avg_mask")
        if mask is not None and vectors:
            group["exp_avg_mask"] = mask = mask.to(vectors[0].device)
            torch._foreach_mul_(vectors, [mask] * len(vectors))
        return vectors


def gradients(live: list[Tensor]) -> list[Tensor]:
    """Of each; zeros where there is none.

    Raises:
        UnsupportedError: one is sparse.
    """
    found = [torch.zeros_like(p) if p.grad is None else p.grad for p in live]
    if any(g.is_sparse for g in found):
        raise UnsupportedError("1-bit optimizers take no sparse gradients: build the embedding with sparse=False")
    return found


def positive(name: str, **values: Any) -> None:
    """Raise `ConfigError` for a value that is not a whole number of 1 or more."""
    for key, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ConfigError(f"{name}: {key} must be a whole number of 1 or more, not {value!r}")
