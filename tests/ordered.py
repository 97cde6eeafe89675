"""Ranks as threads of one process, over a transport that pairs operations by the order in which ranks issue them."""

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
    """

    def __init__(self, size: int, seed: int | None = None) -> None:
        super().__init__(size)
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
    """One rank of it; a scope names its operations and pairs none."""

    ordered = True
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
        self._answers = answers

    def scoped(self, name: str) -> OrderedTransport:
        root: Any = self._parent or self
        return OrderedTransport(self.world, self.rank, self._answers, name, root)

    def _post(self, kind: str, x: Tensor, argument: object = None) -> _OrderedHandle:  # type: ignore[override]
        world, operation = self.world, (self._name, kind, x.numel(), str(x.dtype))
        with world.lock:
            mine = world.issued[self.rank]
            place = len(mine)
            mine.append(operation)
            for rank, issued in enumerate(world.issued):
                if len(issued) > place and kind != "all_to_all" and issued[place] != operation:
                    raise Disorder(f"operation {place}: rank {self.rank} {operation}, rank {rank} {issued[place]}")
                if len(issued) > place and issued[place][:2] != operation[:2]:
                    raise Disorder(f"operation {place}: {operation}, {issued[place]}")
            world.post(("", place), self.rank, kind, x.clone(), argument)
            world.lock.notify_all()
        return _OrderedHandle(world, ("", place), self.rank, self._answers)


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
                    raise Disorder(f"rank {self._rank} waits in vain for operation {self._key[1]}")
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
