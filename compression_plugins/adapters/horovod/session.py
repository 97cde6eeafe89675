"""One DistributedOptimizer's gradients on their way through the reducer.

Buckets are filled by Horovod's hooks, launched by their last member, advanced by the hooks that follow, and drained in
`synchronize()`.
"""

from __future__ import annotations

import json
import os
import weakref
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from horovod.torch import mpi_ops
from torch import Tensor

from ... import __version__
from ...config import Config
from ...engine.notice import announce
from ...engine.plan import Bucket, Plan, TensorSpec, make_plan
from ...engine.preload import warm_up
from ...engine.reducer import Job, Reducer
from ...engine.telemetry import Telemetry
from ...errors import MismatchError, UnsupportedError
from ...optimizer.quantized_weights import QuantizedWeights
from ...schemes import registry
from ...schemes.double_quantization import DoubleQuantization
from ...transports.horovod import HorovodTransport
from .handshake import Standing, compare, gather_texts

#: Sessions of optimizers that are still alive.
sessions: weakref.WeakSet[Session] = weakref.WeakSet()
_created: Counter[int] = Counter()


class _Filling:
    """A bucket, the gradients that have come, its job in flight, and the reduced gradients.

    Gradients are packed into one fp32 vector when all are there; the only one of its bucket is reduced where it is.
    """

    def __init__(self, bucket: Bucket) -> None:
        self.bucket = bucket
        self.lengths = [segment.numel for segment in bucket.segments]
        self.empty()

    @cached_property
    def _flat(self) -> Tensor:
        return torch.zeros(self.bucket.numel, dtype=torch.float32, device=self.bucket.device)

    @cached_property
    def _places(self) -> list[Tensor]:
        return list(self._flat.split(self.lengths))

    def empty(self) -> None:
        self.gradients: dict[int, Tensor] = {}
        self.job: Job | None = None
        self.reduced: tuple[Tensor, ...] | None = None

    def take(self, place: int, gradient: Tensor) -> Tensor | None:
        """Accept the gradient of segment number `place`; the flat vector of all when none is missing any more."""
        self.gradients[place] = gradient
        if len(self.gradients) < len(self.lengths):
            return None
        gradients, flat = self.gradients, gradient
        self.empty()
        if len(gradients) > 1 or gradient.dtype != torch.float32:
            torch._foreach_copy_(self._places, [gradients[i] for i in range(len(gradients))])
            flat = self._flat
        return flat


class _Slot(NamedTuple):
    """Where a parameter's gradient lies: in which bucket, as which of its segments."""

    filling: _Filling
    place: int


@dataclass
class _Tally:
    """What a session has done, for the one line at its end."""

    scheme: str
    speaks: bool = False
    ranks: str = ""
    steps: int = 0
    dense: float = 0.0
    sent: float = 0.0
    exposed_s: float = 0.0

    def report(self) -> None:
        if self.speaks and self.steps:
            announce(
                f"horovod: {self.scheme}, {self.steps} steps on {self.ranks}: "
                f"{self.sent / self.steps / 1e6:.3f} MB sent a step and rank "
                f"(dense {self.dense / self.steps / 1e6:.3f} MB, {self.dense / max(self.sent, 1):.1f}x), "
                f"{1e3 * self.exposed_s / self.steps:.2f} ms a step of communication exposed"
            )


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
        self.included = bool(self.process_set.included())
        self._op, self._sparse_as_dense = optimizer.op, optimizer.sparse_as_dense
        self._names: dict[Tensor, str] = {
            p: optimizer._parameter_names[p] for g in optimizer.param_groups for p in g["params"] if p.requires_grad
        }
        for p, name in self._names.items():
            if not p.is_floating_point():
                raise UnsupportedError(
                    f"horovod compression: {name!r} is {p.dtype}; only real floating point is reduced"
                )
        self._sparse: set[Tensor] = set()
        self.plan = self._make_plan()  # what can be refused before the first gradient is refused here
        if self.included:
            config.check_ranks(self.process_set.size())
        if self.included and self.process_set.size() > 1:
            warm_up(config, self.plan, self.process_set.rank(), self.process_set.size())
        self._reducer: Reducer | None = None
        self._loaded: dict[str, Any] = {}  # a state that came before there was a reducer
        self._world = (-1, -1)  # rank and size with which the memory was built
        self._horovod_run: object = None
        self._slots: dict[Tensor, _Slot] = {}
        self._fillings: list[_Filling] = []
        self._early: list[Tensor] = []  # gradients that came before the session was open
        self._weights: list[QuantizedWeights] = []
        self._telemetry: Telemetry | None = None
        self._tally, self._dense, self._earlier = _Tally(config.scheme.name), 0.0, (0.0, 0.0)
        weakref.finalize(self, self._tally.report)  # at the end of the process, too
        set_id = self.process_set.process_set_id
        self.name = (
            f"compression_plugins.{set_id}.{_created[set_id]}"  # constructors run in the same order on all ranks
        )
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
            self.reducer.progress()
        else:
            self._early.append(p)
        return lambda: self._result(p)

    def _fill(self, p: Tensor) -> None:
        assert p.grad is not None  # the hook, or the seam, has made one
        filling, place = self._slots[p]
        flat = filling.take(place, (p.grad.to_dense() if p.grad.is_sparse else p.grad).detach().reshape(-1))
        if flat is not None:
            filling.job = self.reducer.start(filling.bucket, flat)

    # -- in synchronize() and step()

    def _result(self, p: Tensor) -> Tensor:
        if self._early:
            self.open()
        filling, place = self._slots[p]
        if filling.reduced is None:
            assert filling.job is not None  # synchronize() submits every parameter before it asks for the first result
            mean = filling.job.result()
            total = mean * self.process_set.size() if self._op == mpi_ops.Sum else mean
            filling.reduced = total.split(filling.lengths)
        return filling.reduced[place].view(p.shape).to(p.dtype if p.grad is None else p.grad.dtype)

    def end_step(self) -> None:
        """All results are taken: the step is over."""
        if any(filling.job for filling in self._fillings):
            for filling in self._fillings:
                filling.empty()
            self.reducer.end_step()
            self._tally.steps += 1
            self._tally.dense += self._dense
            self._tally.sent = self._earlier[0] + self.reducer.transport.sent
            self._tally.exposed_s = self._earlier[1] + self.reducer.seconds.exposed
            self.restore_weights()

    def restore_weights(self) -> None:
        """Exact weights for the optimizer, where the scheme quantizes them for the forward pass."""
        for weights in self._weights:
            weights.restore()

    def quantize_weights(self) -> None:
        """After the optimizer's step."""
        step = self.reducer.step - 1 if self._weights else -1
        if step >= self.config.warmup_steps:
            for weights in self._weights:
                weights.quantize(step)

    def abort(self) -> None:
        """Forget what is in flight, which a restored or loaded state makes worthless."""
        self._early.clear()
        for filling in self._fillings:
            filling.empty()
        if self._reducer is not None:
            self._reducer.abort()

    # -- at the start of a Horovod run

    def is_open(self) -> bool:
        """False before the first step, and again after `hvd.init()`, by which elastic training changes the world."""
        return self._horovod_run is mpi_ops._handle_map  # a new object after every init()

    def open(self) -> None:
        """Plan, compare with the other ranks, launch what has come so far. Blocks until every rank is here.

        Raises:
            MismatchError: on every rank, if ranks differ; or if one does not come.
        """
        early, state = list(self._early), self.state_dict()
        self.abort()
        self.plan = self._make_plan()
        self._start(state)
        kept, step = self._agree()
        if not kept:
            # A memory belongs to a rank of a world. In a new one it starts at zero, everywhere; only the step goes on.
            self._start({})
            self.reducer.step = step
        self._place()
        self._horovod_run, self._loaded = mpi_ops._handle_map, {}
        transport = self.reducer.transport
        self._world = (transport.rank, transport.size)
        size = transport.size
        self._dense = 8 * sum(bucket.numel for bucket in self.plan.buckets) * (size - 1) / size
        self._tally.ranks, self._tally.speaks = "1 rank" if size == 1 else f"{size} ranks", transport.rank == 0
        if self._tally.speaks:
            announce(f"horovod: {self.config.scheme.name} on {self._tally.ranks}, {self.plan.table()}")
        for p in early:
            self._fill(p)

    def _start(self, state: dict[str, Any]) -> None:
        transport = HorovodTransport(self.name, self.process_set)
        if self._telemetry is None:
            self._telemetry = Telemetry.from_environment(transport.rank)
        self._earlier = (self._tally.sent, self._tally.exposed_s)
        self._reducer = Reducer(self.config, transport, self._telemetry)
        self._weights = self._quantized_weights()
        if state:
            self._load(state)

    def _agree(self) -> tuple[bool, int]:
        """Compare all that must be equal. Do the memories belong to these ranks, and what step is it?"""
        reducer = self.reducer
        places: dict[str, int] = {}  # how parameters spread over devices shapes the buckets; which devices does not
        tensors = {
            name: [position, str(p.dtype), list(p.shape), places.setdefault(str(p.device), len(places))]
            for position, (p, name) in enumerate(self._names.items())
            if p not in self._sparse
        }
        facts = {"version": __version__, "config": self.config.to_dict(), "op": self._op}
        ranks = compare(reducer.transport, facts, tensors, Standing(reducer.step, *self._world))
        steps = [rank.step for rank in ranks]
        fresh = all(rank.size == -1 for rank in ranks)
        same_world = all((rank.rank, rank.size) == (i, len(ranks)) for i, rank in enumerate(ranks))
        if len(set(steps)) == 1 and (fresh or same_world):
            return True, steps[0]
        if fresh and os.environ.get("HOROVOD_ELASTIC") != "1":
            raise MismatchError(
                f"horovod compression: the loaded states are of different steps, rank by rank {steps}; "
                "every rank must load its own state of one and the same step"
            )
        if reducer.transport.rank == 0:
            announce(f"horovod: the ranks have changed; compression memory starts again at zero, at step {max(steps)}")
        return False, max(steps)

    def _make_plan(self) -> Plan:
        specs = [
            TensorSpec(name, tuple(p.shape), str(p.dtype).removeprefix("torch."), str(p.device))
            for p, name in self._names.items()
            if p not in self._sparse
        ]
        return make_plan(self.config, specs)

    def _place(self) -> None:
        parameters = {name: p for p, name in self._names.items()}
        self._fillings, self._slots = [_Filling(bucket) for bucket in self.plan.buckets], {}
        for filling in self._fillings:
            for place, segment in enumerate(filling.bucket.segments):
                self._slots[parameters[segment.name]] = _Slot(filling, place)

    def _quantized_weights(self) -> list[QuantizedWeights]:
        parameters = {name: p for p, name in self._names.items()}
        chosen: dict[DoubleQuantization, list[tuple[str, Tensor]]] = {}
        for row in self.plan.rows:
            if isinstance(row.scheme, DoubleQuantization) and row.scheme.weights:
                chosen.setdefault(row.scheme, []).append((row.name, parameters[row.name]))
        return [QuantizedWeights(scheme, named, self.config.seed) for scheme, named in chosen.items()]

    @property
    def reducer(self) -> Reducer:
        if self._reducer is None:
            raise RuntimeError("no step has been reduced yet")
        return self._reducer

    # -- state

    def state_dict(self) -> dict[str, Any]:
        """This rank's memory; {} before the first step."""
        if self._reducer is None:
            return self._loaded
        return {**self._reducer.state_dict(), "weights": [weights.state_dict() for weights in self._weights]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a `state_dict()` of this rank; from {}, begin again."""
        self.abort()
        if self._reducer is not None and state:
            self._load(state)
        else:
            self._reducer, self._loaded, self._weights, self._horovod_run = None, state, [], None

    def _load(self, state: dict[str, Any]) -> None:
        self.reducer.load_state_dict(state)
        for weights, saved in zip(self._weights, state.get("weights", []), strict=True):
            weights.load_state_dict(saved)

    # -- hvd.join()

    def prepare_join(self) -> None:
        """A rank that has joined adds zeros to sums and can do nothing else.

        Raises:
            UnsupportedError: a bucket needs more than sums, and would crash Horovod's communication thread.
        """
        for bucket in self.plan.buckets:
            if not bucket.scheme.sums_only:
                able = ", ".join(name for name in registry.names() if registry.get(name).sums_only)
                raise UnsupportedError(
                    f"horovod compression: after hvd.join() a rank can only add zeros to sums; {bucket.scheme.name!r} "
                    f"needs more. Use a scheme of sums ({able}), or give every rank the same number of steps"
                )
        if not self.is_open():
            self.open()


def agree_on_steps(live: list[Session]) -> None:
    """After `hvd.join()`: ranks that left early have missed steps, and the step seeds choices that all ranks share."""
    own = json.dumps({session.name: session.reducer.step for session in live}).encode()
    texts = gather_texts(HorovodTransport("compression_plugins.join"), own)
    for session in live:
        session.reducer.step = max(json.loads(text).get(session.name, 0) for text in texts)
