"""0/1 Adam, Lu et al., 2022, arXiv 2202.06009."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from ..directions import ZeroOneAdam as Schedule
from .base import Group, OneBit, gradients, positive


class ZeroOneAdam(OneBit):
    """Adam whose variance is measured in dense steps at growing intervals, on gradients that travel in signs between
    them; later v is frozen, and ranks take steps by themselves between exchanges of what they have moved.

    Until `var_freeze_step`: the interval of dense steps is 1 and doubles after every `var_update_scaler` of them. After
    it: u sums up what a rank has moved, and every so many steps u (sqrt(v) + eps) is averaged in signs; the weights
    become those of the last exchange plus the mean of u, m becomes -u / (sum of learning rates). The interval is 1 and
    doubles after every `local_step_scaler` steps, up to `local_step_clipper`.

    Departures from the paper. Moments are bias-corrected with `bias_correction`, v by its number of dense steps. What
    has no variance does not move. Between two exchanges each rank has weights of its own, in evaluations and
    checkpoints, too; the weights of an exchange come from a copy, so that all ranks hold the same bits. Coding is the
    business of the ranks.

    Args:
        var_freeze_step, var_update_scaler, local_step_scaler, local_step_clipper: as above.
        bias_correction, weight_decay: as of `OneBitAdam`; what weights decay by counts in u, as in DeepSpeed's own.

    Attributes:
        freeze_key: whether v is frozen.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        bias_correction: bool = True,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        eps_inside_sqrt: bool = False,
        weight_decay: float = 0.0,
        var_freeze_step: int = 100_000,
        var_update_scaler: int = 16,
        local_step_scaler: int = 32_678,
        local_step_clipper: int = 16,
        amsgrad: bool = False,
    ) -> None:
        positive("ZeroOneAdam", var_freeze_step=var_freeze_step, var_update_scaler=var_update_scaler)
        positive("ZeroOneAdam", local_step_scaler=local_step_scaler, local_step_clipper=local_step_clipper)
        self.var_freeze_step, self.var_update_scaler = var_freeze_step, var_update_scaler
        self.local_step_scaler, self.local_step_clipper = local_step_scaler, local_step_clipper
        self.freeze_key = False
        self._schedule = Schedule(var_update_scaler=var_update_scaler, var_freeze_step=var_freeze_step)
        defaults = {"lr": lr, "bias_correction": bias_correction, "betas": betas, "eps": eps}
        super().__init__(params, {**defaults, "weight_decay": weight_decay}, amsgrad, eps_inside_sqrt)

    def measures(self, step: int) -> bool:
        """Whether v is measured in step number `step`, the first of which is 1."""
        return bool(self._schedule.interval(step - 1))

    def exchanges(self, step: int) -> bool:
        """Whether ranks, which train by themselves by then, meet at the end of step number `step`."""
        local = step - self.var_freeze_step
        doublings = min((local - 1) // self.local_step_scaler, 32)
        return local > 0 and step % min(self.local_step_clipper, 1 << doublings) == 0

    def _averages(self) -> bool:
        self.freeze_key = self.steps >= self.var_freeze_step
        return self.measures(self.steps + 1)

    def _loaded(self) -> None:
        for state in self.state.values():  # weights are those of rank 0 now, on every rank
            for key in ("momentum_accumulator", "anchor", "lrs"):
                state.pop(key, None)

    def _take(self) -> None:
        if self.steps > self.var_freeze_step:
            self._step_alone()
            return
        measures = self.measures(self.steps)
        lives = [self._live(group, absent=not measures) for group in self.param_groups]
        found = [gradients(live) for live in lives]
        if not measures:
            self._mean({p: g for live, own in zip(lives, found) for p, g in zip(live, own)}, "gradient")
        for group, live, own in zip(self.param_groups, lives, found):
            if group["bias_correction"] and self._schedule.exact_rounds(self.steps) == self.steps:
                self._adamw(group, live)  # every step so far was dense
                continue
            self._add_to_m(live, own if measures else self._masked(group, own), group["betas"][0])
            if measures:
                self._add_to_v(live, own, group["betas"][1])
            self._count(live)
            self._move(group, live)

    def _step_alone(self) -> None:
        lives = [self._live(group, absent=True) for group in self.param_groups]
        for group, live in zip(self.param_groups, lives):
            for p in live:
                state = self.state[p]
                if "anchor" not in state:
                    state["anchor"], state["lrs"] = p.detach().clone(), 0.0
                    state["momentum_accumulator"] = torch.zeros_like(p)
                state["lrs"] += group["lr"]
            self._add_to_m(live, gradients(live), group["betas"][0])
            self._count(live)
            update = self._move(group, live)
            if live:
                torch._foreach_add_(self._of(live, "momentum_accumulator"), update)
        if self.exchanges(self.steps):
            self._meet(lives)

    def _meet(self, lives: list[list[Tensor]]) -> None:
        sent: dict[Tensor, Tensor] = {}
        roots = [self._roots(group, live) for group, live in zip(self.param_groups, lives)]
        for live, root in zip(lives, roots):
            moved = self._of(live, "momentum_accumulator")
            if moved:
                torch._foreach_mul_(moved, root)
            sent |= zip(live, moved)
        self._mean(sent, "update")
        for group, live, root in zip(self.param_groups, lives, roots):
            for p, mean, r in zip(live, self._masked(group, self._of(live, "momentum_accumulator")), root):
                state = self.state[p]
                mean.mul_(state["exp_avg_sq"] > 0)
                if state["lrs"]:
                    torch.div(mean, -state["lrs"], out=state["exp_avg"])
                    if group["bias_correction"]:
                        state["exp_avg"].mul_(1 - group["betas"][0] ** int(state["step"]))
                p.copy_(state["anchor"].addcdiv_(mean, r))
                mean.zero_()
                state["lrs"] = 0.0

    def _roots(self, group: Group, live: list[Tensor]) -> list[Tensor]:
        """sqrt(v) + eps."""
        if not live:
            return []
        roots = list(torch._foreach_sqrt(self._of(live, "exp_avg_sq")))
        if group["bias_correction"]:
            counts = [self._schedule.exact_rounds(int(step)) for step in self._of(live, "step")]
            torch._foreach_div_(roots, [(1 - group["betas"][1] ** max(1, n)) ** 0.5 for n in counts])
        torch._foreach_add_(roots, group["eps"])
        return roots

    def _move(self, group: Group, live: list[Tensor]) -> list[Tensor]:
        """Step the weights; what they have moved by."""
        if not live:
            return []
        m = self._of(live, "exp_avg")
        torch._foreach_mul_(m, [(v > 0).to(v.dtype) for v in self._of(live, "exp_avg_sq")])
        if group["bias_correction"]:
            m = list(torch._foreach_div(m, [1 - group["betas"][0] ** int(s) for s in self._of(live, "step")]))
        update = list(torch._foreach_div(m, self._roots(group, live)))
        if group["weight_decay"]:
            torch._foreach_add_(update, live, alpha=group["weight_decay"])
        torch._foreach_mul_(update, -group["lr"])
        torch._foreach_add_(live, update)
        return update
