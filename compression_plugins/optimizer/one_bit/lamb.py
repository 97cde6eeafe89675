"""1-bit LAMB, Li et al., 2021, arXiv 2104.06069."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from ...errors import ConfigError
from .base import Group, OneBit, gradients, positive


class OneBitLamb(OneBit):
    """LAMB (You et al., 2019, arXiv 1904.00962) for `freeze_step` steps; then v is frozen, m is averaged in signs, and
    the trust ratio of each tensor is its average from the warm-up times a factor.

    The factor is the largest quotient of the frozen to a fresh root of v, the fresh one made of the gradients that the
    averages of m stand for; it is kept in [factor_min, factor_max], and within `factor_threshold` of the last. Before m
    is sent, every tensor is scaled to the mean size of all (`scaling_coeff`), so that tensors that share a scale of the
    code lose alike.

    Departures from the paper. `bias_correction` corrects m and v as in `OneBitAdam`. What has no variance does not
    move, and has no part in the factor. Coding is the business of the ranks.

    Args:
        freeze_step, bias_correction: as of `OneBitAdam`.
        weight_decay: added to the update before its norm is taken.
        max_coeff, min_coeff: bounds of the trust ratio.
        coeff_beta: decay of its average in the warm-up.
        factor_max, factor_min, factor_threshold: bounds of the factor, and of its change in a step.

    Attributes:
        lamb_freeze_key: whether v is frozen.
        lamb_coeffs: the trust ratios of the last step, in the order of the parameters.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        freeze_step: int = 100_000,
        bias_correction: bool = True,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        eps_inside_sqrt: bool = False,
        weight_decay: float = 0.0,
        max_coeff: float = 10.0,
        min_coeff: float = 0.01,
        amsgrad: bool = False,
        coeff_beta: float = 0.9,
        factor_max: float = 4.0,
        factor_min: float = 0.5,
        factor_threshold: float = 0.1,
    ) -> None:
        positive("OneBitLamb", freeze_step=freeze_step)
        if not (0 <= coeff_beta < 1 and 0 < factor_min <= factor_max and factor_threshold > 0):
            raise ConfigError(
                "OneBitLamb: coeff_beta is from 0 to below 1, 0 < factor_min <= factor_max, 0 < factor_threshold; not "
                f"{coeff_beta!r}, {factor_min!r}, {factor_max!r}, {factor_threshold!r}"
            )
        self.freeze_step, self.lamb_freeze_key = freeze_step, False
        self.coeff_beta, self.factor_max = coeff_beta, factor_max
        self.factor_min, self.factor_threshold = factor_min, factor_threshold
        self.lamb_coeffs: list[float] = []
        defaults = {"lr": lr, "bias_correction": bias_correction, "betas": betas, "eps": eps}
        defaults |= {"weight_decay": weight_decay, "max_coeff": max_coeff, "min_coeff": min_coeff}
        super().__init__(params, defaults, amsgrad, eps_inside_sqrt)

    def get_lamb_coeffs(self) -> list[float]:
        """The trust ratios of the last step, in the order of the parameters."""
        return self.lamb_coeffs

    def _averages(self) -> bool:
        self.lamb_freeze_key = self.steps >= self.freeze_step
        return not self.lamb_freeze_key

    def _take(self) -> None:
        found: list[Tensor] = []
        if self.steps <= self.freeze_step:
            for group in self.param_groups:
                found += self._warm(group)
        else:
            found = self._coded()
        self.lamb_coeffs = torch.stack(found).tolist() if found else []

    def _live(self, group: Group, absent: bool = False) -> list[Tensor]:
        live = super()._live(group, absent)
        for p in live:
            state = self.state[p]
            if "last_factor" not in state:
                state["lamb_coeff_freeze"] = torch.zeros((), device=p.device)
                state["last_factor"] = torch.ones((), device=p.device)
                state["exp_avg_sq_fresh"] = torch.zeros_like(state["exp_avg_sq"])
        return live

    def _warm(self, group: Group) -> list[Tensor]:
        live = self._live(group)
        if not live:
            return []
        m = self._add_to_m(live, gradients(live), group["betas"][0])
        v = self._add_to_v(live, gradients(live), group["betas"][1])
        self._count(live)
        if self.steps == self.freeze_step:
            torch._foreach_copy_(self._of(live, "exp_avg_sq_fresh"), v)
        update = list(torch._foreach_div(self._corrected(group, live, m, 0), self._roots(group, live, v)))
        if group["weight_decay"]:
            torch._foreach_add_(update, live, alpha=group["weight_decay"])
        weights, updates = (torch.stack(torch._foreach_norm(tensors)) for tensors in (live, update))
        ratios = (weights / updates).clamp(group["min_coeff"], group["max_coeff"])
        coefficients = list(torch.where((weights != 0) & (updates != 0), ratios, 1.0).unbind())
        for kept, coefficient in zip(self._of(live, "lamb_coeff_freeze"), coefficients):
            average = self.coeff_beta * kept + (1 - self.coeff_beta) * coefficient
            kept.copy_(torch.where(coefficient != 1, average, kept))
        self._move(group, live, update, coefficients)
        return coefficients

    def _coded(self) -> list[Tensor]:
        """A step with a frozen v."""
        lives = [self._live(group, absent=True) for group in self.param_groups]
        self._scale([p for live in lives for p in live])
        before: list[list[Tensor]] = []
        sent: dict[Tensor, Tensor] = {}
        for group, live in zip(self.param_groups, lives):
            before.append([m.clone() for m in self._of(live, "exp_avg")])
            m = self._add_to_m(live, gradients(live), group["betas"][0])
            torch._foreach_mul_(m, self._of(live, "scaling_coeff"))
            sent |= dict(zip(live, m))
            self._count(live)
        self._mean(sent, "update")
        found: list[Tensor] = []
        for group, live, old in zip(self.param_groups, lives, before):
            if live:
                found += self._frozen(group, live, old)
        return found

    def _scale(self, live: list[Tensor]) -> None:
        """What each tensor's m is multiplied by on its way: made once, when v freezes."""
        if not live or all("scaling_coeff" in self.state[p] for p in live):
            return
        sizes = torch.stack([m.norm() / m.numel() ** 0.5 for m in self._of(live, "exp_avg")])
        coefficients = torch.where(sizes > 0, sizes[sizes > 0].mean() / sizes, 1.0)
        for p, coefficient in zip(live, coefficients.unbind()):
            self.state[p].setdefault("scaling_coeff", coefficient.clone())

    def _frozen(self, group: Group, live: list[Tensor], old: list[Tensor]) -> list[Tensor]:
        beta1, beta2 = group["betas"]
        m, v = self._of(live, "exp_avg"), self._of(live, "exp_avg_sq")
        fresh = self._of(live, "exp_avg_sq_fresh")
        moves = [each > 0 for each in v]
        torch._foreach_div_(m, self._of(live, "scaling_coeff"))
        torch._foreach_mul_(self._masked(group, m), [each.to(m[0].dtype) for each in moves])
        rebuilt = torch._foreach_div(torch._foreach_sub(m, torch._foreach_mul(old, beta1)), 1 - beta1)
        torch._foreach_mul_(fresh, beta2)
        torch._foreach_addcmul_(fresh, rebuilt, rebuilt, value=1 - beta2)
        roots = self._roots(group, live, v)
        adam = list(torch._foreach_div(self._corrected(group, live, m, 0), roots))
        update = list(torch._foreach_add(adam, live, alpha=group["weight_decay"])) if group["weight_decay"] else adam
        quotients = torch._foreach_div(roots, self._roots(group, live, fresh))
        coefficients = []
        for i, state in enumerate(self.state[p] for p in live):
            factor = torch.where(moves[i], quotients[i], 0.0).max()
            if group["weight_decay"]:
                share = (adam[i].norm() / update[i].norm()).clamp(max=1.0).nan_to_num(1.0)
                factor = factor * share + (1 - share)
            last, room = state["last_factor"], self.factor_threshold
            factor = factor.clamp(self.factor_min, self.factor_max).clamp(last * (1 - room), last * (1 + room))
            last.copy_(factor)
            coefficients.append(state["lamb_coeff_freeze"] * factor)
        self._move(group, live, update, coefficients)
        return coefficients

    def _corrected(self, group: Group, live: list[Tensor], vectors: list[Tensor], which: int) -> list[Tensor]:
        """`vectors`, m (0) or v (1), over what their bias leaves of them."""
        if not group["bias_correction"]:
            return vectors
        limit = self.freeze_step if which else None
        steps = [min(int(step), limit or int(step)) for step in self._of(live, "step")]
        return list(torch._foreach_div(vectors, [1 - group["betas"][which] ** t for t in steps]))

    def _roots(self, group: Group, live: list[Tensor], v: list[Tensor]) -> list[Tensor]:
        roots = list(torch._foreach_sqrt(self._corrected(group, live, v, 1)))
        torch._foreach_add_(roots, group["eps"])
        return roots

    def _move(self, group: Group, live: list[Tensor], update: list[Tensor], coefficients: list[Tensor]) -> None:
        for p, u, coefficient in zip(live, update, coefficients):
            p.add_(u * (-group["lr"] * coefficient))
