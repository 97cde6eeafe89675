"""Gradients that a host hands over one by one, as buckets of a plan, and back."""

from __future__ import annotations

import torch
from torch import Tensor

from . import loss_scale
from .driver import Work
from .plan import Bucket, Plan
from .reducer import Reducer


class _Filling:
    """A bucket, the gradients that have come, and its work in flight.

    Gradients are packed into one vector when all are there, and the average is copied back into them: what a script
    holds of a gradient is its own. The only one of its bucket is reduced where it is.
    """

    def __init__(self, bucket: Bucket) -> None:
        self.bucket = bucket
        self.gradients: dict[int, Tensor] = {}
        self.absent: set[str] = set()
        self.exact = False
        self.work: Work[Tensor] | None = None
        self._flats: dict[torch.dtype, Tensor] = {}

    @property
    def complete(self) -> bool:
        return len(self.gradients) == len(self.bucket.segments)

    def flat(self, dtype: torch.dtype) -> Tensor:
        """The gradients as one vector in the order of the bucket, [bucket.numel] of `dtype`; the gradient's own storage
        where there is only one and it has that dtype.
        """
        if len(self.gradients) == 1:
            (gradient,) = self.gradients.values()
            return gradient.reshape(-1).to(dtype)
        flat = self._flats.get(dtype)
        if flat is None:
            flat = self._flats[dtype] = torch.empty(self.bucket.numel, dtype=dtype, device=self.bucket.device)
        torch._foreach_copy_(self._places(flat), self._in_order())
        return flat

    def give_back(self, average: Tensor) -> None:
        """Every gradient becomes its part of the average."""
        pairs = [
            (gradient, place)
            for gradient, place in zip(self._in_order(), self._places(average))
            if gradient.data_ptr() != place.data_ptr() or gradient.stride() != place.stride()
        ]
        if pairs:
            torch._foreach_copy_([gradient for gradient, _ in pairs], [place for _, place in pairs])

    def _in_order(self) -> list[Tensor]:
        return [self.gradients[i] for i in range(len(self.gradients))]

    def _places(self, flat: Tensor) -> list[Tensor]:
        parts = flat.split([segment.numel for segment in self.bucket.segments])
        return [part.view(gradient.shape) for part, gradient in zip(parts, self._in_order())]


class Fillings:
    """The buckets of a plan during one backward pass after another.

    Where order is a contract between ranks, buckets are started in the order of the plan, whichever is full first.

    Args:
        scale: what averages are multiplied by, as a host wants sums.
    """

    def __init__(self, plan: Plan, reducer: Reducer, scale: float = 1.0) -> None:
        self._reducer, self._scale = reducer, scale
        self._fillings = [_Filling(bucket) for bucket in plan.buckets]
        self._slots = {
            segment.name: (filling, place)
            for filling in self._fillings
            for place, segment in enumerate(filling.bucket.segments)
        }
        self._next = 0  # of those that must start in order

    def give(self, name: str, gradient: Tensor, absent: bool = False, exact: bool = False) -> None:
        """Take the gradient of parameter `name` now; `collect` makes it the average. Where ranks train by themselves it
        stays what it is.

        Args:
            absent: this rank has none; `gradient` is zeros.
            exact: average the bucket without compression, and without a trace in the state.
        """
        filling, place = self._slots[name]
        if self._reducer.local:
            if self._scale != 1.0:
                gradient.mul_(self._scale)
            return
        filling.gradients[place] = gradient
        filling.exact |= exact
        if absent:
            filling.absent.add(name)
        if not filling.complete:
            return
        if not self._reducer.transport.ordered:
            self._start(filling)
            return
        while self._next < len(self._fillings) and self._fillings[self._next].complete:
            self._start(self._fillings[self._next])
            self._next += 1

    def missing(self) -> list[str]:
        """Parameters whose gradients have not come."""
        return [
            segment.name
            for filling in self._fillings
            for place, segment in enumerate(filling.bucket.segments)
            if place not in filling.gradients
        ]

    def collect(self) -> None:
        """Wait for everything that was started, and give it back."""
        self._reducer.drain()
        self.clear()
        self._reducer.judge()

    def clear(self) -> None:
        """Forget gradients that have come, after an abort."""
        for filling in self._fillings:
            filling.gradients.clear()
            filling.absent.clear()
            filling.exact = False
            filling.work = None
        self._next = 0

    def _start(self, filling: _Filling) -> None:
        bucket, reducer = filling.bucket, self._reducer
        as_is = filling.exact or reducer.as_is(bucket)
        flat = filling.flat(getattr(torch, bucket.dtype) if as_is else torch.float32)
        scale = None if as_is else loss_scale.current()
        if scale is not None:
            flat.div_(scale)
        filling.work = reducer.start(bucket, flat, absent=frozenset(filling.absent), exact=filling.exact)

        def done(average: Tensor) -> None:
            if scale is not None:
                average.mul_(scale)
            if self._scale != 1.0:
                average.mul_(self._scale)
            filling.give_back(average)

        filling.work.then(done)
