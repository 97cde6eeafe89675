"""Ranks as threads of one process, which wait for each other, over a transport that pairs operations by their order."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from torch import Tensor

from compression_plugins.transports.local import LocalTransport, LocalWorld

T = TypeVar("T")
_PATIENCE_S = 30.0


class Disorder(AssertionError):
    """Ranks have issued different sequences of operations, or wait for each other."""


class OrderedWorld(LocalWorld):
    """As Gloo and NCCL do, but an operation that meets another one is an error, not a wrong sum.

    Args:
        seed: of the answers of `poll`, which are random and differ between ranks; None: what is so.
        ordered: False: operations find each other by name, as Horovod's do.
    """

    def __init__(self, size: int, seed: int | None = None, ordered: bool = True) -> None:
        super().__init__(size)
        self.ordered = ordered
        self.lock = threading.Condition()
        self.failure: BaseException | None = None
        self.issued: list[list[tuple[Any, ...]]] = [[] for _ in range(size)]
        self.transports: list[OrderedTransport] = [  # type: ignore[assignment]
            OrderedTransport(self, rank, None if seed is None else random.Random(seed + rank)) for rank in range(size)
        ]

    def each(self, run: Callable[[int, OrderedTransport], T]) -> list[T]:
        """`run(rank, transport)` on every rank at the same time; what they return."""
        results: list[Any] = [None] * self.size

        def rank(number: int) -> None:
            try:
                results[number] = run(number, self.transports[number])
            except BaseException as error:
                with self.lock:
                    self.failure = self.failure or error
                    self.lock.notify_all()

        threads = [threading.Thread(target=rank, args=(number,), daemon=True) for number in range(self.size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if self.failure is not None:
            raise self.failure
        return results


class OrderedTransport(LocalTransport):
    """One rank of it."""

    world: OrderedWorld

    def __init__(
        self,
        world: OrderedWorld,
        rank: int,
        answers: random.Random | None,
        name: str = "",
        parent: OrderedTransport | None = None,
    ) -> None:
        super().__init__(world, rank, name, parent)
        self._answers, self.ordered = answers, world.ordered

    def scoped(self, name: str) -> OrderedTransport:
        root: Any = self._parent or self
        use = root._scopes[name] = root._scopes.get(name, 0) + 1
        return OrderedTransport(self.world, self.rank, self._answers, f"{name}#{use}", root)

    def subgroup(self, ranks: Sequence[int]) -> LocalTransport:
        with self.world.lock:
            if tuple(sorted(ranks)) not in self.world.groups:
                seed = None if self._answers is None else self._answers.randrange(1000)
                self.world.groups[tuple(sorted(ranks))] = OrderedWorld(len(ranks), seed, self.world.ordered)
            return super().subgroup(ranks)

    def _post(self, kind: str, x: Tensor, argument: object = None) -> _OrderedHandle:  # type: ignore[override]
        world, operation = self.world, (self._name, kind, x.numel(), str(x.dtype))
        with world.lock:
            key = (self._name, self._calls)
            self._calls += 1
            if world.ordered:
                key = ("", len(world.issued[self.rank]))
                others = [issued[key[1]] for issued in world.issued if len(issued) > key[1]]
                same = 2 if kind == "all_to_all" else 4  # whose lengths are each rank's own
                if any(other[:same] != operation[:same] for other in others):
                    raise Disorder(f"operation {key[1]}: rank {self.rank} {operation}, others {others}")
            world.issued[self.rank].append(operation)
            world.post(key, self.rank, kind, x.clone(), argument)
            world.lock.notify_all()
        return _OrderedHandle(world, key, self.rank, self._answers)


class _OrderedHandle:
    def __init__(self, world: OrderedWorld, key: tuple[str, int], rank: int, answers: random.Random | None) -> None:
        self._world, self._key, self._rank, self._answers = world, key, rank, answers

    def poll(self) -> bool:
        with self._world.lock:
            ready = self._world.ready(self._key)
        return ready and (self._answers is None or self._answers.random() < 0.5)

    def wait(self) -> Tensor:
        until, world = time.monotonic() + _PATIENCE_S, self._world
        with world.lock:
            while not world.ready(self._key):
                if world.failure is not None:
                    raise Disorder("another rank has failed") from world.failure
                if not world.lock.wait(max(0.0, until - time.monotonic())):
                    raise Disorder(f"rank {self._rank} waits in vain for operation {self._key}")
            return world.take(self._key, self._rank)


def same_order(world: OrderedWorld) -> Sequence[tuple[Any, ...]]:
    """The operations that all ranks have issued, without lengths.

    Raises:
        Disorder: they differ.
    """
    first, *others = ([operation[:2] for operation in issued] for issued in world.issued)
    if any(other != first for other in others):
        raise Disorder(f"ranks issued different operations: {first}, {others}")
    return first
