"""1-bit Adam, Tang et al., 2021, arXiv 2102.02888."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from .base import Group, OneBit, gradients, positive


class OneBitAdam(OneBit):
    """AdamW for `freeze_step` steps; then v is frozen, and m, to which each rank adds its own gradient, is averaged in
    signs.

    Departures from the paper. v is bias-corrected as in torch, with the steps that it has measured, and m with all;
    `bias_correction=False` leaves both as they are. What has no variance does not move, as in `direction: frozen_adam`.
    Coding is the business of the ranks.

    Args:
        freeze_step: dense steps, which should be some 15 percent of all.
        bias_correction: False is what DeepSpeed's own did, whatever it was told.
        weight_decay: decoupled, as AdamW's.

    Attributes:
        adam_freeze_key: whether v is frozen.

    Example, of one rank alone, which has nobody to average with::

        import torch
        from compression_plugins.optimizer.one_bit import OneBitAdam

        w = torch.ones(4, requires_grad=True)
        optimizer = OneBitAdam([w], lr=0.1, freeze_step=2)
        for _ in range(4):
            optimizer.zero_grad()
            w.square().sum().backward()
            optimizer.step()
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
        amsgrad: bool = False,
    ) -> None:
        positive("OneBitAdam", freeze_step=freeze_step)
        self.freeze_step, self.adam_freeze_key = freeze_step, False
        defaults = {"lr": lr, "bias_correction": bias_correction, "betas": betas, "eps": eps}
        super().__init__(params, {**defaults, "weight_decay": weight_decay}, amsgrad, eps_inside_sqrt)

    def _averages(self) -> bool:
        self.adam_freeze_key = self.steps >= self.freeze_step
        return not self.adam_freeze_key

    def _take(self) -> None:
        if self.steps <= self.freeze_step:
            for group in self.param_groups:
                self._warm(group)
            return
        sent: dict[Tensor, Tensor] = {}
        for group in self.param_groups:
            live = self._live(group, absent=True)
            sent |= zip(live, self._add_to_m(live, gradients(live), group["betas"][0]))
            self._count(live)
        self._mean(sent, "update")
        for group in self.param_groups:
            live = self._live(group, absent=True)
            self._move(group, live, self._masked(group, self._of(live, "exp_avg")))

    def _warm(self, group: Group) -> None:
        live = self._live(group)
        if group["bias_correction"]:
            self._adamw(group, live)
            return
        m = self._add_to_m(live, gradients(live), group["betas"][0])
        self._add_to_v(live, gradients(live), group["betas"][1])
        self._count(live)
        self._move(group, live, m)

    def _move(self, group: Group, live: list[Tensor], m: list[Tensor]) -> None:
        if not live:
            return
        v = self._of(live, "exp_avg_sq")
        torch._foreach_mul_(m, [(each > 0).to(each.dtype) for each in v])
        roots = torch._foreach_sqrt(v)
        lr = group["lr"]
        if group["bias_correction"]:
            steps = [int(step) for step in self._of(live, "step")]
            beta1, beta2 = group["betas"]
            torch._foreach_div_(roots, [(1 - beta2 ** min(t, self.freeze_step)) ** 0.5 for t in steps])
            top = list(torch._foreach_div(m, [1 - beta1**t for t in steps]))
        else:
            top = m
        torch._foreach_add_(roots, group["eps"])
        update = torch._foreach_div(top, roots)
        if group["weight_decay"]:
            torch._foreach_add_(update, live, alpha=group["weight_decay"])
        torch._foreach_mul_(update, -lr)
        torch._foreach_add_(live, update)
