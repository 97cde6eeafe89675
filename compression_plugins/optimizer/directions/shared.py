"""Shared directions: one Adam for all ranks, whose first moment is what travels.

Every rank keeps the same m and v, the same bits. In a dense step they are updated from the exact mean of the gradients,
as on one machine. In a coded one each rank adds its own gradient to the shared m, the scheme averages the results, and
the average is the new m, while v rests. A rank without a gradient sends beta1 m.

Weights whose gradient has always been zero have v = 0, where a code that cannot say 0 would move them by m / eps: what
has no variance sends nothing and does not move. A tiny variance is not zero: rare rows of an embedding are safer with a
rule `scheme: none`, whose m is exact.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from ..._lazy import torch
from ...core.memory import finite, nan_unless, restore_unless, zero_unless
from ...errors import ConfigError, UnsupportedError
from .base import Betas, Direction, Eps, Run, Steps, once_in_a_step

if TYPE_CHECKING:
    from torch import Tensor

    from ...core.call import Call, Reduction, Segment
    from ...core.memory import Vector


class _SharedAdam(Direction):
    """What the two have in common."""

    shared: ClassVar[bool] = True

    betas: Betas = Field((0.9, 0.999), description="decays, as in torch.optim.Adam")
    eps: Eps = Field(1e-8, description="as in torch.optim.Adam")

    def interval(self, at: int) -> int:
        """For how many steps a dense one stands at round `at`; 0: the step is coded."""
        raise NotImplementedError

    def _measures_later(self, at: int) -> bool:
        """Whether any round from `at` on is dense."""
        raise NotImplementedError

    def mean(self, x: Tensor, call: Call, run: Run) -> Reduction:
        once_in_a_step(call)
        warming = call.clock.round < 0
        dense = 1 if warming else self.interval(call.clock.round)
        first, second = call.state.exchange("shared_m"), call.state.exchange("shared_v")
        clocks = [call.state.tensor("shared_clock", s.name, partial(self._clock, s, x, call)) for s in call.segments]
        steps = torch.stack(clocks)
        if dense:
            mean = yield from run(x, True)
            healthy = finite(mean)
            gradient, decay = zero_unless(healthy, mean), self.betas[1] ** dense
            torch.mul(first.old, torch.where(healthy, self.betas[0], 1.0), out=first.new)
            first.new.add_(gradient, alpha=1 - self.betas[0])
            torch.mul(second.old, torch.where(healthy, decay, 1.0), out=second.new)
            second.new.addcmul_(gradient, gradient, value=1 - decay)
            steps.add_(healthy * dense)
            torch._foreach_copy_(clocks, list(steps))
        else:
            moves = second.old > 0
            x.mul_(1 - self.betas[0]).add_(first.old, alpha=self.betas[0]).mul_(moves)  # what is not finite stays so
            scales = self._scales(first.old, call)
            if scales:
                torch._foreach_mul_(pieces_of(x, call), scales)
            mean = yield from run(x, False)
            if scales:
                torch._foreach_div_(pieces_of(mean, call), scales)
            healthy = finite(mean)
            torch.mul(mean, moves, out=first.new)
            restore_unless(healthy, first)
            second.new.copy_(second.old)
        unbias_m, unbias_v = ((1 - beta ** steps.clamp(min=1)).float() for beta in self.betas)
        pieces = pieces_of(torch.sqrt(second.new, out=mean), call)
        torch._foreach_div_(pieces, list(unbias_v.sqrt()))
        torch.div(first.new, mean.add_(self.eps), out=mean)
        if warming:
            torch._foreach_div_(pieces, list(unbias_m))
        self._finish(mean, call, first, second, healthy, unbias_v)
        return nan_unless(healthy, mean)

    def _scales(self, m: Tensor, call: Call) -> list[Tensor] | None:
        """What every tensor of the bucket is multiplied by on its way; `m` is that of the last step."""
        return None

    def _finish(
        self, direction: Tensor, call: Call, first: Vector, second: Vector, healthy: Tensor, unbias_v: Tensor
    ) -> None:
        """Change `direction`, flat fp32 [numel], once more."""

    def _clock(self, segment: Segment, x: Tensor, call: Call) -> Tensor:
        """The count of steps that a tensor's v stands for: 0. It is made when v is first measured, or not at all.

        Raises:
            UnsupportedError: v will not be measured any more.
        """
        if call.clock.round >= 0 and not self._measures_later(call.clock.round):
            raise UnsupportedError(
                f"direction: {self.kind}: the variance of {segment.name!r} is not known at step {call.clock.step}, "
                "after the last dense one: load the compression state of the job that measured it, let all parameters "
                "learn from the first step on, or use direction: gradient"
            )
        return torch.zeros((), dtype=torch.float64, device=x.device)


def pieces_of(flat: Tensor, call: Call) -> list[Tensor]:
    """Views of the bucket's tensors."""
    return list(flat.split([segment.numel for segment in call.segments]))


class FrozenAdam(_SharedAdam):
    """1-bit Adam (Tang et al., 2021, arXiv 2102.02888): Adam in the dense warm-up of T steps, then a frozen variance.

    In the warm-up (`warmup_steps`, some 15 percent of all steps) the direction is that of `torch.optim.Adam` on the
    averaged gradient. From then on v rests, beta1 m + (1 - beta1) g is what the scheme averages, the average is the
    new m, and the direction is m / (sqrt(v / (1 - beta2^T)) + eps).

    Departures from the paper. The scheme is whatever the configuration names, with its own memory, not one bit in two
    stages. Both phases of Adam are bias-corrected in v, as torch has it, so that the steps do not change in size where
    v freezes; m is corrected in the warm-up only. Elements whose v is zero do not move. Exempt tensors, which travel
    exactly, freeze too.
    """

    kind: Literal["frozen_adam"] = "frozen_adam"

    def check(self, warmup_steps: int) -> None:
        if not warmup_steps:
            raise ConfigError(
                f"direction: {self.kind}: a frozen variance needs a dense warm-up; set warmup_steps to some 15 percent "
                "of the steps"
            )

    def interval(self, at: int) -> int:
        return 0

    def _measures_later(self, at: int) -> bool:
        return False


class ZeroOneAdam(_SharedAdam):
    """0/1 Adam (Lu et al., 2022, arXiv 2202.06009): 1-bit Adam with a variance that dense steps refresh now and then.

    The first step after the warm-up, which may be empty, is dense. With `refresh: growing` the interval to the next
    dense step is 1 and doubles after every `var_update_scaler` of them, until `var_freeze_step` steps after the
    warm-up; with a number it is that number. A dense step that is followed by k - 1 coded ones stands for k in v:
    v <- beta2^k v + (1 - beta2^k) g^2, and in its bias correction.

    Departures from the paper. Its local steps between synchronizations are not here: every step is synchronized. In v
    a dense step counts for the interval that it stands for, where the paper counts it once: so v forgets at the same
    pace whatever the interval. Elements whose v is zero do not move until a dense step finds a gradient. Between dense
    steps it is m that is averaged from the first coded step on, as in 1-bit Adam.
    """

    kind: Literal["zero_one_adam"] = "zero_one_adam"
    refresh: Steps | Literal["growing"] = Field(
        "growing", description="steps from one dense step to the next; growing: by var_update_scaler"
    )
    var_update_scaler: Steps = Field(16, description="refresh: growing: dense steps after which the interval doubles")
    var_freeze_step: Steps = Field(100_000, description="steps after the warm-up from which the variance is frozen")

    @property
    def exact_share(self) -> float:
        return 0.0 if self.refresh == "growing" else 1 / self.refresh

    def interval(self, at: int) -> int:
        if not self._measures_later(at):
            return 0
        interval, since = self._phase(at)
        return 0 if since % interval else interval

    def exact_rounds(self, rounds: int) -> int:
        if rounds <= 0:
            return 0
        interval, since = self._phase(min(rounds, self.var_freeze_step))
        doublings = 0 if self.refresh != "growing" else interval.bit_length() - 1
        return doublings * self.var_update_scaler - (-since // interval)

    def _measures_later(self, at: int) -> bool:
        return at < self.var_freeze_step

    def _phase(self, at: int) -> tuple[int, int]:
        """The interval of the dense steps around round `at`, and the rounds for which it has been in use."""
        if self.refresh != "growing":
            return self.refresh, at
        interval = 1 << (at // self.var_update_scaler + 1).bit_length() - 1
        return interval, at - self.var_update_scaler * (interval - 1)
