"""One DistributedOptimizer's gradients on their way through the reducer: buckets are filled by Horovod's hooks, launched
by their last member, advanced by the hooks that follow, and drained in `synchronize()`."""

from __future__ import annotations

import os
import weakref
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from horovod.torch import mpi_ops
from torch import Tensor

from .. import __version__
from ..config import Config
from ..errors import MismatchError, UnsupportedError
from ..plan import Bucket, TensorSpec, make_plan
from ..reducer import Job, Reducer
from ..schemes.base import Segment
from ..transports.horovod import HorovodTransport
from .horovod_handshake import Standing, compare
from .notice import announce

#: Sessions of optimizers that are still alive.
sessions: weakref.WeakSet[Session] = weakref.WeakSet()
_created: Counter[int] = Counter()


class _Filling:
    """A bucket with its flat fp32 gradient, the number of segments still missing, its job in flight, and its result."""

    def __init__(self, bucket: Bucket) -> None:
        self.bucket = bucket
        self.flat = torch.zeros(bucket.numel, dtype=torch.float32, device=bucket.device)
        self.empty()

    def empty(self) -> None:
        self.missing = len(self.bucket.segments)
        self.job: Job | None = None
        self.reduced: Tensor | None = None


class _Slot(NamedTuple):
    """Where a piece of a parameter lies: `segment` of it stands at `offset` of the bucket."""

    filling: _Filling
    offset: int
    segment: Segment


class Session:
    """The compressed reduction of one optimizer.

    Nothing is communicated before the first `synchronize()`: only then is it known which gradients are sparse, and only
    then is every rank there to compare notes. From the second step on, buckets travel during backward.

    Args:
        config: what to do.
        optimizer: a Horovod optimizer whose constructor is done.

    Raises:
        CompressionError: the configuration does not fit these parameters.
    """

    def __init__(self, config: Config, optimizer: Any) -> None:
        self.config = config
        self.process_set = optimizer.process_set
        self._op, self._sparse_as_dense = optimizer.op, optimizer.sparse_as_dense
        self._names: dict[Tensor, str] = {
            p: optimizer._parameter_names[p] for g in optimizer.param_groups for p in g["params"] if p.requires_grad
        }
        for p, name in self._names.items():
            if not p.is_floating_point():
                raise UnsupportedError(f"horovod compression: {name!r} is {p.dtype}; only real floating point is reduced")
        self._sparse: set[Tensor] = set()
        self.plan = self._make_plan()  # what can be refused before the first gradient is refused here
        self.reducer: Reducer | None = None
        self._loaded: dict[str, Any] | None = None  # a state that came before there was a reducer
        self._world = (-1, -1)  # rank and size with which the reducer's memory was built
        self._horovod_run: object = None
        self._slots: dict[Tensor, list[_Slot]] = {}
        self._fillings: list[_Filling] = []
        self._early: list[Tensor] = []  # gradients that came before the session was open
        set_id = self.process_set.process_set_id
        self._name = f"compression_plugins.{set_id}.{_created[set_id]}"  # constructors run in the same order on all ranks
        _created[set_id] += 1
        sessions.add(self)

    # -- during backward

    def takes(self, p: Tensor) -> bool:
        """False for a parameter whose gradients are sparse and stay so: Horovod reduces those itself."""
        if not self.is_open() and p.grad is not None and p.grad.is_sparse and not self._sparse_as_dense:
            self._sparse.add(p)
        return p not in self._sparse

    def submit(self, p: Tensor) -> Callable[[], Tensor]:
        """Take `p.grad` now, and return what gives the reduced gradient later."""
        if self.is_open():
            self._fill(p)
            self._reducer.progress()
        else:
            self._early.append(p)
        return lambda: self._result(p)

    def _fill(self, p: Tensor) -> None:
        gradient = (p.grad.to_dense() if p.grad.is_sparse else p.grad).detach().reshape(-1)
        for filling, offset, segment in self._slots[p]:
            piece = gradient[segment.start : segment.start + segment.numel]
            filling.flat[offset : offset + segment.numel].copy_(piece)
            filling.missing -= 1
            if filling.missing == 0:
                filling.empty()
                filling.job = self._reducer.start(filling.bucket, filling.flat)

    # -- in synchronize()

    def _result(self, p: Tensor) -> Tensor:
        if self._early:
            self.open()
        pieces = [self._reduced(filling)[at : at + segment.numel] for filling, at, segment in self._slots[p]]
        flat = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
        return flat.view(p.shape).to(p.grad.dtype)

    def _reduced(self, filling: _Filling) -> Tensor:
        if filling.reduced is None:
            filling.reduced = filling.job.result()
            if self._op == mpi_ops.Sum:
                filling.reduced = filling.reduced * self.process_set.size()
        return filling.reduced

    def end_step(self) -> None:
        """All results are taken: the step is over."""
        if any(filling.job for filling in self._fillings):
            for filling in self._fillings:
                filling.empty()
            self._reducer.end_step()

    def abort(self) -> None:
        """Forget what is in flight, which a restored or loaded state makes worthless."""
        self._early.clear()
        for filling in self._fillings:
            filling.empty()
        if self.reducer is not None:
            self.reducer.abort()

    # -- at the start of a Horovod run

    def is_open(self) -> bool:
        """False before the first step, and again after `hvd.init()`, by which elastic training changes the world."""
        return self._horovod_run is mpi_ops._handle_map  # a new object after every init()

    def open(self) -> None:
        """Plan, compare with the other ranks, launch what has come so far. Blocks until every rank is here.

        Raises:
            MismatchError: on every rank, if ranks differ; or if one does not come.
        """
        early = list(self._early)
        state = self.state_dict()
        self.abort()
        self.plan = self._make_plan()
        transport = HorovodTransport(self._name, self.process_set)
        self.reducer = Reducer(self.config, transport)
        if state:
            self.reducer.load_state_dict(state)
        self._loaded = None
        self._agree(transport)
        self._world = (transport.rank, transport.size)
        self._place()
        self._horovod_run = mpi_ops._handle_map
        for p in early:
            self._fill(p)

    def _make_plan(self) -> Any:
        return make_plan(
            self.config,
            [TensorSpec(name, tuple(p.shape), p.dtype, p.device) for p, name in self._names.items() if p not in self._sparse],
        )

    def _place(self) -> None:
        parameters = {name: p for p, name in self._names.items()}
        self._fillings = [_Filling(bucket) for bucket in self.plan.buckets]
        self._slots = {}
        for filling in self._fillings:
            offset = 0
            for segment in filling.bucket.segments:
                self._slots.setdefault(parameters[segment.name], []).append(_Slot(filling, offset, segment))
                offset += segment.numel

    def _agree(self, transport: HorovodTransport) -> None:
        tensors = {
            name: [position, str(p.dtype), list(p.shape)]
            for position, (p, name) in enumerate(self._names.items())
            if p not in self._sparse
        }
        facts = {"version": __version__, "config": self.config.to_dict(), "op": self._op, "plan": self.plan.digest()}
        ranks = compare(transport, facts, tensors, Standing(self._reducer.step, *self._world))
        steps = [rank.step for rank in ranks]
        fresh = all(rank.size == -1 for rank in ranks)
        same_world = all((rank.rank, rank.size) == (i, transport.size) for i, rank in enumerate(ranks))
        if len(set(steps)) == 1 and (fresh or same_world):
            return
        if fresh and os.environ.get("HOROVOD_ELASTIC") != "1":
            raise MismatchError(
                f"horovod compression: the loaded states are of different steps, rank by rank {steps}; "
                "load_state_dict() must be given each rank's own state of one step"
            )
        # A memory belongs to a rank of a world. In a new one it starts at zero, everywhere; only the step goes on.
        self.reducer = Reducer(self.config, transport)
        self.reducer.step = max(steps)
        if transport.rank == 0:
            announce(f"horovod: the ranks changed; compression memory is reset at step {max(steps)}")

    @property
    def _reducer(self) -> Reducer:
        if self.reducer is None:
            raise RuntimeError("the compression session is not open")
        return self.reducer

    # -- state

    def state_dict(self) -> dict[str, Any]:
        """This rank's memory (residuals, factors, step); {} before the first step."""
        if self.reducer is not None:
            return self.reducer.state_dict()
        return self._loaded or {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a `state_dict()` of this rank."""
        self.abort()
        if self.reducer is None:
            self._loaded = state or None
        elif state:
            self.reducer.load_state_dict(state)
        else:
            self.reducer, self._loaded, self._horovod_run = None, None, None
