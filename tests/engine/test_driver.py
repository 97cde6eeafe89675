"""Programs finish whatever the order of their start; where order is a contract, all ranks issue the same operations."""

from __future__ import annotations

import random
from collections.abc import Generator
from typing import Any

import pytest
import torch
from torch import Tensor

from compression_plugins.collectives import payloads
from compression_plugins.engine.driver import Engine
from compression_plugins.engine.plan import Plan, TensorSpec, make_plan
from compression_plugins.engine.reducer import Reducer
from compression_plugins.errors import CompressionError
from compression_plugins.schemes import registry
from compression_plugins.transports.base import Done, Transport
from compression_plugins.transports.local import LocalWorld, drive

from ..ordered import Disorder, OrderedTransport, OrderedWorld, same_order
from ..world import assert_same, config

SIZE, BUCKETS = 3, 5
HOPS = [{"form": "ring", "flush_steps": 2}, {"form": "torus", "flush_steps": 2}]
CASES = [(name, {}) for name in registry.names()] + [("marsit", keys) for keys in HOPS]


@pytest.fixture(autouse=True)
def long_payloads(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that payloads meet in two stages."""
    monkeypatch.setattr(payloads, "_WORTH_A_ROUND", 0)


def several(name: str, keys: dict[str, Any]) -> tuple[Any, Plan]:
    """A configuration, and a plan of several buckets of different lengths."""
    cfg = config(name, bucket_mb=0.004, **keys)
    plan = make_plan(cfg, [TensorSpec(f"w{i}", (20 + i, 40), "float32") for i in range(BUCKETS)])
    assert len(plan.buckets) == BUCKETS
    return cfg, plan


def gradient(bucket: Any, rank: int, step: int) -> Tensor:
    return torch.randn(bucket.numel, generator=torch.Generator().manual_seed(bucket.id % 1000 + 10 * step + rank))


def title(value: Any) -> str:
    return value if isinstance(value, str) else value.get("form", "")


@pytest.mark.parametrize(("name", "keys"), CASES, ids=title)
def test_programs_that_ranks_start_in_different_orders_finish_where_operations_have_names(
    name: str, keys: dict[str, Any]
) -> None:
    """Ranks that wait for one operation keep nobody waiting for another one."""
    cfg, plan = several(name, keys)

    def run(rank: int, transport: OrderedTransport) -> list[Tensor]:
        reducer, shuffle, results = Reducer(cfg, transport), random.Random(rank), []
        for step in range(3):
            works = {}
            for bucket in shuffle.sample(plan.buckets, len(plan.buckets)):
                works[bucket] = reducer.start(bucket, gradient(bucket, rank, step))
                if shuffle.random() < 0.5:
                    reducer.progress()
            reducer.drain()
            results += [works[bucket].result().clone() for bucket in plan.buckets]
            reducer.end_step()
        return results

    first, *others = OrderedWorld(SIZE, ordered=False).each(run)
    assert all(torch.equal(a, b) for other in others for a, b in zip(first, other))


@pytest.mark.parametrize(("name", "keys"), CASES, ids=title)
def test_ranks_issue_the_same_operations_whatever_polls_say_and_none_waits_in_vain(
    name: str, keys: dict[str, Any]
) -> None:
    cfg, plan = several(name, keys)
    world = OrderedWorld(SIZE, seed=7)

    def run(rank: int, transport: OrderedTransport) -> list[Tensor]:
        reducer, asks = Reducer(cfg, transport), random.Random(rank)
        results = []
        for step in range(3):
            works = []
            for bucket in plan.buckets:
                works.append(reducer.start(bucket, gradient(bucket, rank, step)))
                for _ in range(asks.randrange(4)):  # hosts ask at moments of their own
                    reducer.progress()
                    asks.choice(works).poll()
            reducer.drain()
            results += [work.result().clone() for work in works]
            reducer.end_step()
        return results

    first, *others = world.each(run)
    assert same_order(world)
    assert all(torch.equal(a, b) for other in others for a, b in zip(first, other))


def test_the_ordered_transport_of_these_tests_tells_ranks_that_differ() -> None:
    def run(rank: int, transport: OrderedTransport) -> None:
        names = ["a", "b"] if rank else ["b", "a"]
        for handle in [transport.scoped(name).all_reduce(torch.ones(2)) for name in names]:
            handle.wait()

    with pytest.raises(Disorder, match="operation 0"):
        OrderedWorld(2).each(run)


def rounds(transport: Transport, count: int, log: list[str], name: str) -> Generator[Any, Any, int]:
    """A program of `count` operations, which notes what it is about to issue."""
    total = 0
    try:
        for i in range(count):
            log.append(f"{name}{i}")
            total += int((yield transport.all_reduce(torch.ones(1))))
    finally:
        log.append(f"{name} closed")
    return total


class Alone(Transport):
    """One rank of one."""

    rank, size = 0, 1

    def __init__(self, ordered: bool) -> None:
        super().__init__()
        self.ordered = ordered

    def scoped(self, name: str) -> Alone:
        return self

    def subgroup(self, ranks: Any) -> Alone:
        return self

    def _all_reduce(self, x: Tensor) -> Done:
        return Done(x)

    _all_gather = _all_to_all = _broadcast = _send_recv = _all_reduce  # type: ignore[assignment]


@pytest.mark.parametrize("ordered", [True, False])
def test_the_first_operation_leaves_when_a_program_is_run(ordered: bool) -> None:
    log: list[str] = []
    engine = Engine(ordered)
    work = engine.run(rounds(Alone(ordered), 2, log, "a"))
    assert log == ["a0"] and work.phase == 1 and not work.done


def test_where_order_is_a_contract_second_operations_leave_with_the_fourth_program_and_in_drain() -> None:
    log: list[str] = []
    engine, transport = Engine(True), Alone(True)
    works = []
    for name in "abcd":
        works.append(engine.run(rounds(transport, 2, log, name)))
        engine.progress()
        assert not works[0].poll()
    assert log == ["a0", "b0", "c0", "a1", "d0"]
    engine.drain()
    assert log[5:] == ["b1", "c1", "d1", "a closed", "b closed", "c closed", "d closed"], "level by level"
    assert [work.result() for work in works] == [2] * 4


def test_where_operations_have_names_progress_goes_as_far_as_it_can() -> None:
    log: list[str] = []
    engine = Engine(False)
    work = engine.run(rounds(Alone(False), 3, log, "a"))
    engine.progress()
    assert work.done and work.result() == 3


@pytest.mark.parametrize("ordered", [True, False])
def test_an_aborted_program_cleans_up_and_the_engine_goes_on(ordered: bool) -> None:
    log: list[str] = []
    engine, transport = Engine(ordered), Alone(ordered)
    work = engine.run(rounds(transport, 2, log, "a"))
    called: list[int] = []
    work.then(called.append)
    engine.abort()
    assert log == ["a0", "a closed"] and work.done and work.aborted and engine.seconds.in_flight == 0
    with pytest.raises(CompressionError, match="aborted"):
        work.result()
    assert engine.run(rounds(transport, 2, log, "b")).result() == 2 and not called


@pytest.mark.parametrize("ordered", [True, False])
@pytest.mark.parametrize("after", [0, 1])
@pytest.mark.parametrize("where", ["program", "operation"])
def test_an_error_is_raised_once_and_the_engine_goes_on(ordered: bool, after: int, where: str) -> None:
    engine, transport = Engine(ordered), Alone(ordered)
    log: list[str] = []

    class Broken(Done):
        def wait(self) -> Tensor:
            raise OSError("the peer is gone")

    def fails() -> Generator[Any, Any, int]:
        for _ in range(after):
            yield transport.all_reduce(torch.ones(1))
        if where == "operation":
            yield Broken(torch.ones(1))
        raise OSError("no such thing")

    def attempt() -> None:
        engine.run(fails())
        engine.drain()

    other = engine.run(rounds(transport, 3, log, "other"))
    with pytest.raises(OSError):
        attempt()
    engine.drain()
    assert other.result() == 3 and engine.seconds.in_flight == 0
    assert engine.run(rounds(transport, 2, log, "next")).result() == 2


def test_callbacks_get_the_result_once_whether_they_come_before_or_after_it() -> None:
    engine, found = Engine(False), []
    work = engine.run(rounds(Alone(False), 1, [], "a"))
    work.then(lambda value: found.append(("before", value)))
    engine.drain()
    work.then(lambda value: found.append(("after", value)))
    engine.drain()
    assert found == [("before", 1), ("after", 1)]


@pytest.mark.parametrize("name", registry.names())
def test_an_aborted_step_leaves_the_state_as_it_was(name: str) -> None:
    """In whatever operation it is, with parameters that are absent."""
    cfg = config(name)
    plan = make_plan(cfg, [TensorSpec("used", (30, 20), "float32"), TensorSpec("idle", (20, 20), "float32")])
    (bucket,) = plan.buckets
    worlds = [LocalWorld(2), LocalWorld(2)]
    straight, aborting = ([Reducer(cfg, t) for t in world.transports] for world in worlds)

    def step(reducers: list[Reducer], number: int) -> Tensor:
        works = [r.start(bucket, gradient(bucket, rank, number)) for rank, r in enumerate(reducers)]
        drive(works)
        for reducer in reducers:
            reducer.end_step()
        return works[0].result()

    for number in range(6):
        assert torch.equal(step(straight, number), step(aborting, number))
        for started in (1, 2):  # alone, a rank stays in its first operation
            for reducer in aborting[:started]:
                flat = gradient(bucket, 5, 100 + number)
                flat[: 20 * 20] = 0
                reducer.start(bucket, flat, absent=frozenset({bucket.segments[0].name})).poll()
            for reducer in aborting:
                reducer.abort()
                reducer.transport._scopes.clear()  # names begin anew, as those of Horovod do
            worlds[1]._posts.clear()
            worlds[1]._results.clear()
        for kept, left in zip(straight, aborting):
            assert_same(kept.state_dict(), left.state_dict())
