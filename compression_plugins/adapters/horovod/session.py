"""One DistributedOptimizer's gradients on their way through the reducer.

Buckets are filled by Horovod's hooks, launched by their last member, advanced by the hooks that follow, and drained in
`synchronize()`. The step is over when the optimizer has stepped; gradients that are thrown away before leave no trace.
"""

from __future__ import annotations

import itertools
import json
import os
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

from horovod.torch import mpi_ops
from torch import Tensor

from ...config import Config
from ...engine.filling import Fillings
from ...engine.notice import announce
from ...engine.plan import make_plan
from ...engine.saved import Folder, Judged, on_cpu, reader
from ...engine.session import Session
from ...errors import MismatchError, UnsupportedError
from ...transports.horovod import HorovodTransport
from ..shared import forward
from .handshake import Standing, compare, gather_texts
from .memory import Memory, from_first_holder, mean_at_commit, share_out
from .refusals import refuse_join, refuse_levels

#: Sessions of optimizers that are still alive.
sessions: weakref.WeakSet[HorovodSession] = weakref.WeakSet()
#: The Horovod run in which sessions are numbered, and the numbers by group of ranks.
_run: list[Any] = [None, defaultdict(itertools.count)]


def _name(group: str) -> str:
    """Of the next session of a Horovod run."""
    if _run[0] is not mpi_ops._handle_map:
        _run[:] = [mpi_ops._handle_map, defaultdict(itertools.count)]
    return f"compression_plugins.{group}.{next(_run[1][group])}"


class HorovodSession(Session):
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
        self.process_set = optimizer.process_set
        self.included = bool(self.process_set.included())
        self._op, self._sparse_as_dense = optimizer.op, optimizer.sparse_as_dense
        names: dict[Tensor, str] = optimizer._parameter_names
        groups = [p for group in optimizer.param_groups for p in group["params"]]
        self._names = {p: names[p] for p in groups if p.requires_grad}
        frozen = [name for p, name in names.items() if p not in self._names]
        speaks = not self.included or self.process_set.rank() == 0
        named = {name: p for p, name in self._names.items()}
        super().__init__("horovod", config, named, frozen, speaks, group=str(self.process_set.process_set_id))
        self.check_optimizer(optimizer)
        if config.direction.shared and self._elastic():
            raise UnsupportedError(
                f"horovod compression: direction: {config.direction.kind} keeps the same moments on every rank, and "
                "ranks that join an elastic job have none: use a fixed number of ranks, or direction: gradient"
            )
        if config.levels is not None:
            refuse_levels(config.levels, self._elastic(), bool(self.process_set.process_set_id))
        self._watched = False
        if self.included:
            self.preload(self.process_set.rank(), self.process_set.size())
            self._ensure_hooks()
        self._sparse: set[Tensor] = set()
        self._loaded = Judged({}, "none")  # a state that came before there was a reducer
        self._world = (-1, -1)  # rank and size with which the memory was built
        self._mean: tuple[int, dict[str, Any]] | None = None  # of all ranks' memories at a step, made by a commit
        self._horovod_run: object = None
        self._named: tuple[object, str] = (None, "")
        self._fillings: Fillings | None = None
        self._early: list[tuple[Tensor, bool]] = []  # gradients that came before the session was open
        self._given: dict[Tensor, Tensor] = {}  # what becomes the average: the gradient itself, or it made dense
        self._collected = False
        self._synchronizing = False
        self._stepping: Any = None  # the optimizer that takes a step now
        self._backward = False  # a gradient has come since the last `synchronize()`
        self._pending: dict[Tensor, Tensor | None] = {}  # gradients that are reduced, of which no step was made yet
        sessions.add(self)

    @property
    def name(self) -> str:
        """Made at its first use in each Horovod run: ranks that join an elastic job begin to count then, so all do."""
        if self._named[0] is not mpi_ops._handle_map:
            self._named = mpi_ops._handle_map, _name(self._group)
        return self._named[1]

    # -- during backward

    def takes(self, p: Tensor) -> bool:
        """False for a parameter whose gradients are sparse and stay so: Horovod reduces those itself."""
        if not self.is_open() and p.grad is not None and p.grad.is_sparse and not self._sparse_as_dense:
            if self.config.direction.formed:
                raise UnsupportedError(
                    f"horovod compression: direction: {self.config.direction.kind} cannot be formed of "
                    f"{self._names[p]!r}, whose sparse gradients Horovod reduces itself: use sparse_as_dense=True, or "
                    "direction: gradient"
                )
            self._sparse.add(p)
        return p not in self._sparse

    def submit(self, p: Tensor, absent: bool) -> Callable[[], Tensor]:
        """Take `p.grad` now, and return what gives the reduced gradient later.

        Args:
            absent: this rank has no gradient; `p.grad` is zeros.
        """
        if not self._synchronizing and not self._backward:
            self._begin_backward(p)
        if self.is_open():
            self._fill(p, absent)
            self.reducer.progress()
        else:
            self._early.append((p, absent))
        return lambda: self._result(p)

    def _begin_backward(self, p: Tensor) -> None:
        """The first gradient of a backward pass has come."""
        self._backward = True
        if self.hooks:
            forward.after_this_backward(self)
        if self._pending and p.grad is not self._pending.get(p):
            self.drop()  # no step was made with the last ones, and they are gone
        self._pending = {}

    def _fill(self, p: Tensor, absent: bool) -> None:
        assert p.grad is not None and self._fillings is not None  # the hook, or the seam, has made one
        gradient = (p.grad.to_dense() if p.grad.is_sparse else p.grad).detach()
        self._given[p] = gradient
        if self.reducer.transport.size > 1 or self.config.direction.formed:
            # Reduced gradients that are reduced again without a backward pass in between are averaged as they are.
            self._fillings.give(self._names[p], gradient, absent, exact=bool(self._pending))

    # -- in synchronize(), step() and zero_grad()

    def begin_synchronize(self) -> None:
        """`synchronize()` submits what no hook has."""
        self._synchronizing = True

    def end_synchronize(self) -> None:
        """All results are taken; no step is made with them yet."""
        self._synchronizing = self._collected = self._backward = False
        self.after_backward()
        if self._given:
            self._pending = {p: p.grad for p in self._given}
            self._given = {}

    def _result(self, p: Tensor) -> Tensor:
        if self._early:
            self.open()
        if not self._collected:
            assert self._fillings is not None
            self._fillings.collect()
            self._collected = True
        return self._given[p]

    @contextmanager
    def stepping(self, optimizer: Any) -> Iterator[None]:
        """Around the optimizer's step, which may synchronize."""
        self._stepping = optimizer
        try:
            self.withhold()
            yield
        finally:
            self._stepping = None

    def withhold(self) -> None:
        """In a step that is to be skipped, the optimizer gets no gradients."""
        if self._stepping is not None and self.ill:
            forward.withhold(self._stepping)

    def stepped(self, optimizer: Any) -> None:
        """The optimizer has stepped; if it was with gradients of this session, their step is over."""
        if self._pending:
            self._pending = {}
            self.end_step(optimizer=optimizer)

    def drop(self) -> None:
        """The script has thrown away gradients that no step was made with: they leave no trace."""
        self._pending = {}
        if self.started:
            super().drop()

    def abort(self) -> None:
        """Forget what is in flight, which a restored or loaded state makes worthless."""
        self._early.clear()
        self._given, self._pending = {}, {}
        self._synchronizing = self._collected = self._backward = False
        if self._fillings is not None:
            self._fillings.clear()
        if self.started:
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
        state = self.reducer.state_dict() if self.started else self._loaded.state
        self.abort()
        dense = {name: p for p, name in self._names.items() if p not in self._sparse}
        self.plan = make_plan(self.config, self.specs(dense))
        self._restart(state)
        self._ensure_hooks()
        self._agree()
        transport = self.reducer.transport
        self._fillings = Fillings(self.plan, self.reducer, transport.size if self._op == mpi_ops.Sum else 1)
        self._horovod_run, self._loaded = mpi_ops._handle_map, Judged({}, "none")
        self._world = (transport.rank, transport.size)
        self.opened()
        for p, absent in early:
            self._fill(p, absent)

    def _restart(self, state: Mapping[str, Any]) -> None:
        self.start(HorovodTransport(self.name, self.process_set))
        if state and not self._loaded.bad:
            self.reducer.load_state_dict(state)

    def _ensure_hooks(self) -> None:
        """One rank sends nothing, so it changes nothing."""
        if self.process_set.size() > 1 and not self.hooks:
            self.make_hooks()
        if self.hooks and not self._watched:
            forward.watch(self, self.parameters.values())
            self._watched = True

    def _agree(self) -> None:
        """Compare all that must be equal; in a new world, share out what the old one remembers.

        Raises:
            MismatchError: on every rank: ranks differ, or cannot go on from what they have loaded.
        """
        reducer, elastic = self.reducer, self._elastic()
        facts: dict[str, Any] = {**self.facts(), "op": self._op}
        if not elastic or self._loaded.bad:
            facts["compression state"] = self._loaded.standing
        ranks = compare(reducer.transport, facts, self.tensors(), Standing(reducer.step, *self._world))
        if self._loaded.bad:
            raise MismatchError(f"horovod compression: {self._loaded.standing}")
        if all(rank.size == -1 for rank in ranks):
            return
        if len({rank.step for rank in ranks}) == 1:
            if all((rank.rank, rank.size) == (i, len(ranks)) for i, rank in enumerate(ranks)):
                return
        if not elastic:
            raise MismatchError(
                f"horovod compression: the memories are of steps {[rank.step for rank in ranks]}, rank by rank; every "
                "rank must load its own state of one and the same step"
            )
        self._share_out(max(rank.step for rank in ranks if rank.size != -1))

    def _share_out(self, step: int) -> None:
        """The ranks of an elastic job have changed: each of the new ones gets the mean of the old ones' memories."""
        transport, held = self.reducer.transport, None
        if self._world[1] != -1 and self.reducer.step == step:
            mean = self._mean[1] if self._mean is not None and self._mean[0] == step else None
            held = Memory(self.reducer.state_dict(), self._world, mean)
        memory, whole = share_out(transport, held, step, self.parameters)
        self.after_backward()
        self.reducer.load_state_dict(memory)
        for i, hook in enumerate(self.hooks):
            scope = transport.scoped(f"hook.{i}")
            hook.new_ranks(partial(from_first_holder, scope, held is not None, self.parameters))
        if transport.rank == 0:
            lost = "" if whole else "; what the lost ranks had not sent is lost with them"
            announce(
                f"horovod: the ranks have changed; each of {transport.size} begins step {step} with the mean of what "
                f"the old ones remember{lost}"
            )

    # -- state

    def state_dict(self) -> dict[str, Any]:
        """This rank's memory; {} before the first step."""
        return super().state_dict() if self.started else dict(self._loaded.state)

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write this rank's file."""
        rank, size = self.process_set.rank(), self.process_set.size()
        Folder(folder).write(on_cpu(self.state_dict()), rank, size, sweep=rank == 0)

    def load(self, read: Callable[[], Any]) -> None:
        """Continue from the state that `read` returns, this rank's or a list of all ranks' of a world of any size; from
        {}, begin again. In the next `synchronize()` ranks compare what they have, and all continue, or all stop.
        """
        self._take_up(self.judge(read, self.process_set.rank(), self.process_set.size()))

    def load_folder(self, folder: str | os.PathLike[str]) -> None:
        """`load` from what `save` wrote."""
        self.load(reader(folder, "horovod", self.process_set.rank(), self.process_set.size()))

    def _take_up(self, judged: Judged, world: tuple[int, int] | None = None) -> None:
        self.abort()
        state = judged.state
        self._reducer, self._loaded, self._horovod_run, self._mean = None, judged, None, None
        self._world = world or ((state["rank"], state["size"]) if state else (-1, -1))
        self.load_hooks(state)

    def commit(self) -> Memory:
        """The memory as of the last step, for `revert`. Where the job is elastic and open, with the mean over ranks."""
        state = {} if not self.included else self._raw()
        if self.included and self.is_open() and self._world[1] > 1 and self._elastic():
            if self._mean is None or self._mean[0] != self.reducer.step:
                transport = HorovodTransport(f"{self.name}.commit", self.process_set)
                mean = mean_at_commit(transport, state, self.parameters)
                self._mean = None if mean is None else (self.reducer.step, mean)
        mean = self._mean[1] if self._mean is not None and state and self._mean[0] == state["step"] else None
        return Memory(state, self._world, mean)

    def revert(self, memory: Memory) -> None:
        """Continue from what `commit` gave, here or in the session of an optimizer that this one replaces."""
        if not self.included:
            return
        standing = f"of step {memory.state['step']}" if memory.state else "none"
        self._take_up(Judged(memory.state, standing), memory.world)
        self._mean = None if memory.mean is None else (memory.state["step"], memory.mean)

    def _raw(self) -> Mapping[str, Any]:
        """Without a checksum, which costs as much as a copy."""
        if not self.started:
            return self._loaded.state
        return {**self.reducer.state_dict(), "hooks": [hook.state_dict() for hook in self.hooks]}

    @staticmethod
    def _elastic() -> bool:
        return os.environ.get("HOROVOD_ELASTIC") == "1"

    # -- hvd.join()

    def prepare_join(self) -> None:
        """A rank is about to join: it then adds zeros to sums and can do nothing else.

        Raises:
            UnsupportedError: something needs more.
        """
        refuse_join(self.config, self.plan)
        if not self.is_open():
            self.open()


def agree_on_steps(live: list[HorovodSession]) -> None:
    """After `hvd.join()`: ranks that left early have missed steps, and the step seeds choices that all ranks share."""
    own = json.dumps({session.name: session.reducer.step for session in live}).encode()
    texts = gather_texts(HorovodTransport("compression_plugins.join"), own)
    for session in live:
        session.reducer.step = max(json.loads(text).get(session.name, 0) for text in texts)
