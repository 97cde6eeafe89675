"""Gradients that are not finite: noticed on all ranks alike, and named (`on_nonfinite`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..core.memory import finite
from ..errors import CompressionError
from . import loss_scale
from .notice import warn

if TYPE_CHECKING:
    from ..transports.base import Transport
    from .plan import Bucket


class NonFiniteError(CompressionError):
    """A gradient is not finite, and the configuration says `on_nonfinite: raise`. Raised on every rank."""


class Health:
    """Of the gradients of one step.

    A gradient that is not finite shows in the average on every rank, so that ranks need not ask each other; where each
    gets its own shard only, they do. Where a loss scaler is in use it skips by itself, and nothing is judged here.

    Args:
        mode: of the configuration.

    Attributes:
        on: whether anything is looked at.
        ill: this step is to be skipped.
    """

    def __init__(self, mode: str, transport: Transport) -> None:
        self._mode, self._transport = mode, transport
        self.on, self.ill = mode != "pass", False
        self._own: dict[Bucket, Tensor] = {}  # bool [segments]
        self._averages: list[Tensor] = []
        self._sharded = False
        self._skips = 0

    def sends(self, bucket: Bucket, flat: Tensor) -> bool:
        """This rank's gradient of a bucket, before it travels; False where nothing is to be judged."""
        if not self.on or loss_scale.in_use() or bucket.role != "gradient":
            return False
        flags = torch.stack([finite(part) for part in flat.split([s.numel for s in bucket.segments])])
        self._own[bucket] = self._own[bucket] & flags if bucket in self._own else flags
        return True

    def gets(self, average: Tensor, shards: Sequence[int] | None) -> None:
        """What became of it."""
        if shards is not None:
            self._sharded, average = True, average.split(list(shards))[self._transport.rank]
        self._averages.append(finite(average))

    def judge(self, step: int, speaks: bool) -> None:
        """All gradients of a backward pass are reduced.

        Raises:
            NonFiniteError: one is not finite on some rank.
        """
        averages, self._averages = self._averages, []
        own, self._own = self._own, {}
        sharded, self._sharded = self._sharded, False
        if not averages:
            return
        healthy = bool(torch.stack([flag.to(averages[0].device) for flag in averages]).all())
        if healthy and not sharded:
            return
        names = [(bucket, segment.name) for bucket in sorted(own, key=lambda b: b.id) for segment in bucket.segments]
        flags = torch.cat([own[bucket].cpu() for bucket in sorted(own, key=lambda b: b.id)])
        bad = (~flags).nonzero().flatten().tolist()
        votes = torch.zeros(self._transport.size + 1)
        votes[self._transport.rank] = 1 + bad[0] if bad else 0  # which tensor, where ranks have all alike
        votes[-1] = float(not healthy)
        device = averages[0].device
        said = self._transport.scoped("nonfinite").all_reduce(votes.to(device)).wait().tolist()
        if not any(said):
            return
        told = [
            f"{names[int(word) - 1][1]!r} on rank {rank}"
            for rank, word in enumerate(said[:-1])
            if word and int(word) <= len(names)
        ]
        what = f"step {step}: the gradient is not finite: {', '.join(told[:3])}{', ...' if told[3:] else ''}"
        if not told:
            what = f"step {step}: the average of the gradients is not finite though each is: their sum overflows"
        if self._mode == "raise":
            raise NonFiniteError(f"{what} (on_nonfinite: raise)")
        self.ill = True
        self._skips += 1
        if speaks and (self._skips & (self._skips - 1)) == 0:  # the 1st, 2nd, 4th, 8th, ...
            warn(f"{what}; the step is skipped, {self._skips} of them so far (on_nonfinite: skip)")

    def clear(self) -> None:
        """The step is over, or thrown away."""
        self.ill = self._sharded = False
        self._own.clear()
        self._averages.clear()
