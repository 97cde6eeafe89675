"""N ranks in one process and one thread: for tests, and for studies of up to hundreds of workers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Protocol

import torch

from .base import Transport

if TYPE_CHECKING:
    from torch import Tensor


class Advancing(Protocol):
    """A job that `drive` can move forward; `phase` counts the operations it has started."""

    phase: int

    def poll(self) -> bool: ...


class LocalWorld:
    """`LocalWorld(n).transports` holds one transport per rank; an operation is done when all have posted theirs."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._posts: dict[tuple[str, int], dict[int, tuple[str, Tensor, object]]] = {}
        self._results: dict[tuple[str, int], dict[int, Tensor]] = {}  # until every rank has taken its own
        self.groups: dict[tuple[int, ...], LocalWorld] = {}
        self.transports = [LocalTransport(self, rank) for rank in range(size)]

    def post(self, key: tuple[str, int], rank: int, kind: str, x: Tensor, argument: object) -> None:
        """Rank `rank` takes part in operation `key`; the last rank to do so computes the results."""
        posts = self._posts.setdefault(key, {})
        posts[rank] = (kind, x, argument)
        if len(posts) == self.size:
            kinds = {kind for kind, _, _ in posts.values()}
            if len(kinds) > 1:
                raise RuntimeError(f"operation {key}: ranks disagree on what it is: {sorted(kinds)}")
            inputs = [posts[r][1] for r in range(self.size)]
            results = _OPERATIONS[kind](inputs, [posts[r][2] for r in range(self.size)])
            self._results[key] = dict(enumerate(results))
            del self._posts[key]

    def ready(self, key: tuple[str, int]) -> bool:
        """Whether every rank has taken part."""
        return key in self._results

    def take(self, key: tuple[str, int], rank: int) -> Tensor:
        """The result of rank `rank`, once."""
        if not self.ready(key):
            raise RuntimeError(f"operation {key} waits for a rank that has not posted: drive all ranks' jobs together")
        results = self._results[key]
        result = results.pop(rank)
        if not results:
            del self._results[key]
        return result


class LocalTransport(Transport):
    """One rank of a `LocalWorld`."""

    ordered = False

    def __init__(self, world: LocalWorld, rank: int, name: str = "", parent: LocalTransport | None = None) -> None:
        super().__init__()
        self.world, self.rank, self.size = world, rank, world.size
        self._name, self._parent, self._calls = name, parent, 0
        self._above: LocalTransport | None = None  # of which this is a group
        self._scopes: dict[str, int] = {}

    def scoped(self, name: str) -> LocalTransport:
        root = self._parent or self
        use = root._scopes[name] = root._scopes.get(name, 0) + 1
        return LocalTransport(self.world, self.rank, f"{name}#{use}", root)

    def subgroup(self, ranks: Sequence[int]) -> LocalTransport:
        members = sorted(ranks)
        group = self.world.groups.setdefault(tuple(members), LocalWorld(len(members)))
        part = group.transports[members.index(self.rank)]
        part._above = self
        return part

    def _count(self, nbytes: float) -> None:
        root = self._parent or self
        root.sent += nbytes
        if root._above is not None:
            root._above._count(nbytes)

    def _post(self, kind: str, x: Tensor, argument: object = None) -> _LocalHandle:
        key = (self._name, self._calls)
        self._calls += 1
        self.world.post(key, self.rank, kind, x, argument)
        return _LocalHandle(self.world, key, self.rank)

    def _all_reduce(self, x: Tensor) -> _LocalHandle:
        return self._post("all_reduce", x)

    def _all_gather(self, x: Tensor) -> _LocalHandle:
        return self._post("all_gather", x)

    def _all_to_all(self, x: Tensor, send: Sequence[int], receive: Sequence[int]) -> _LocalHandle:
        return self._post("all_to_all", x, list(send))

    def _broadcast(self, x: Tensor, root: int) -> _LocalHandle:
        return self._post("broadcast", x, root)

    def _send_recv(self, x: Tensor, to: int, source: int, receive: int | None) -> _LocalHandle:
        return self._post("send_recv", x, source)


class _LocalHandle:
    def __init__(self, world: LocalWorld, key: tuple[str, int], rank: int) -> None:
        self._world, self._key, self._rank = world, key, rank

    def poll(self) -> bool:
        return self._world.ready(self._key)

    def wait(self) -> Tensor:
        return self._world.take(self._key, self._rank)


def drive(jobs: Iterable[Advancing]) -> None:
    """Advance the jobs of all ranks in turn until every one is done."""
    pending = list(jobs)
    while pending:
        before = sum(job.phase for job in pending)
        left = [job for job in pending if not job.poll()]
        if len(left) == len(pending) and sum(job.phase for job in left) == before:
            raise RuntimeError(f"{len(left)} jobs wait for each other; did every rank start the same ones?")
        pending = left


def _all_reduce(inputs: list[Tensor], _: list[object]) -> list[Tensor]:
    total = inputs[0].clone()
    for x in inputs[1:]:
        total += x
    return [total.clone() for _ in inputs]


def _all_gather(inputs: list[Tensor], _: list[object]) -> list[Tensor]:
    rows = torch.stack(inputs)
    return [rows for _ in inputs]


def _all_to_all(inputs: list[Tensor], sends: list[list[int]]) -> list[Tensor]:
    parts = [x.split(send) for x, send in zip(inputs, sends)]
    return [torch.cat([parts[source][rank] for source in range(len(inputs))]) for rank in range(len(inputs))]


def _broadcast(inputs: list[Tensor], roots: list[int]) -> list[Tensor]:
    return [inputs[roots[0]].clone() for _ in inputs]


def _send_recv(inputs: list[Tensor], sources: list[int]) -> list[Tensor]:
    return [inputs[source].clone() for source in sources]


_OPERATIONS: dict[str, Callable[..., list[Tensor]]] = {
    "all_reduce": _all_reduce,
    "all_gather": _all_gather,
    "all_to_all": _all_to_all,
    "broadcast": _broadcast,
    "send_recv": _send_recv,
}
