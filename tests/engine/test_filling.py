"""Gradients come one by one, travel as buckets, and come back as averages into their own storage."""

from __future__ import annotations

import random
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor

from compression_plugins.engine import loss_scale
from compression_plugins.engine.absence import ZeroTensors
from compression_plugins.engine.filling import Fillings
from compression_plugins.engine.plan import Plan, TensorSpec, make_plan
from compression_plugins.engine.reducer import Reducer
from compression_plugins.schemes import registry
from compression_plugins.transports.local import LocalWorld

from ..ordered import OrderedTransport, OrderedWorld
from ..world import assert_same, config

SIZE = 2
SHAPES: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
    "conv": ((8, 6, 5, 5), torch.float32),
    "half": ((40, 30), torch.bfloat16),
    "alone": ((64, 50), torch.float32),
    "bias": ((40,), torch.float32),
    "wide": ((20, 20), torch.float64),
}
EXACT = {"topk": {"ratio": 1.0}}  # keeps every value


def plan_of(cfg: Any, shapes: dict[str, tuple[tuple[int, ...], torch.dtype]] = SHAPES) -> Plan:
    specs = [TensorSpec(n, shape, str(dtype).removeprefix("torch.")) for n, (shape, dtype) in shapes.items()]
    return make_plan(cfg, specs)


def draw(name: str, rank: int, step: int = 0, shapes: dict[str, Any] = SHAPES) -> Tensor:
    shape, dtype = shapes[name]
    generator = torch.Generator().manual_seed(1000 * step + 10 * list(shapes).index(name) + rank)
    x = torch.randn(shape, generator=generator).to(dtype)
    return x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x


class Hosts:
    """The fillings of `size` ranks over one plan, ranks with operations that have names."""

    def __init__(self, cfg: Any, shapes: dict[str, Any] = SHAPES, size: int = SIZE, scale: float = 1.0) -> None:
        self.plan, self.shapes = plan_of(cfg, shapes), shapes
        self.reducers = [Reducer(cfg, t) for t in LocalWorld(size).transports]
        self.fillings = [Fillings(self.plan, reducer, scale) for reducer in self.reducers]

    def give(self, given: list[dict[str, Tensor]], **options: Any) -> None:
        absent = options.pop("absent", [()] * len(given))
        for rank, (filling, gradients) in enumerate(zip(self.fillings, given)):
            for name, gradient in gradients.items():
                filling.give(name, gradient, absent=name in absent[rank], **options)
        for reducer in self.reducers * 4:
            reducer.progress()  # all ranks live in one thread: `collect` alone would wait for the others
        for filling in self.fillings:
            filling.collect()

    def end_step(self) -> None:
        for reducer in self.reducers:
            reducer.end_step()


def test_averages_come_back_into_the_gradients_own_storage_with_strides_and_dtype() -> None:
    hosts = Hosts(config("topk", **EXACT["topk"]))
    given = [{name: draw(name, rank) for name in SHAPES} for rank in range(SIZE)]
    seen = [{n: (g.data_ptr(), g.stride(), g.dtype) for n, g in each.items()} for each in given]
    expected = {n: (draw(n, 0).double() + draw(n, 1).double()) / 2 for n in SHAPES}
    assert not given[0]["conv"].is_contiguous()
    hosts.give(given)
    for each, before in zip(given, seen):
        for name, gradient in each.items():
            assert (gradient.data_ptr(), gradient.stride(), gradient.dtype) == before[name]
            torch.testing.assert_close(gradient, expected[name].to(gradient.dtype), msg=name)


def test_the_only_gradient_of_its_bucket_is_reduced_where_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    hosts = Hosts(config("topk"), {"alone": SHAPES["alone"]})
    started: list[int] = []
    plain = Reducer.start
    monkeypatch.setattr(
        Reducer,
        "start",
        lambda self, bucket, flat, **kw: started.append(flat.data_ptr()) or plain(self, bucket, flat, **kw),
    )
    given = [{"alone": draw("alone", rank)} for rank in range(SIZE)]
    hosts.give(given)
    assert started == [each["alone"].data_ptr() for each in given]


@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_a_host_that_wants_sums_gets_averages_times_its_scale(scale: float) -> None:
    hosts = Hosts(config("topk", **EXACT["topk"]), scale=scale)
    given = [{name: draw(name, rank) for name in SHAPES} for rank in range(SIZE)]
    hosts.give(given)
    for name in SHAPES:
        expected = scale * (draw(name, 0).double() + draw(name, 1).double()) / 2
        torch.testing.assert_close(given[0][name], expected.to(given[0][name].dtype))


@pytest.mark.parametrize("name", registry.names())
def test_an_exact_average_is_dense_and_leaves_no_trace(name: str) -> None:
    """Between two compressed steps, with gradients that come in any order."""
    cfg = config(name)
    shapes = {n: s for n, s in SHAPES.items() if n in ("conv", "alone")}
    straight, other = Hosts(cfg, shapes), Hosts(cfg, shapes)
    for step in range(4):
        expected = [{n: draw(n, rank, step, shapes) for n in shapes} for rank in range(SIZE)]
        given = [{n: g.clone() for n, g in each.items()} for each in expected]
        straight.give(expected)
        other.give(given)
        kept = other.reducers[0].state.state_dict()
        again = [{n: draw(n, rank, 50 + step, shapes) for n in shapes} for rank in range(SIZE)]
        dense = {n: sum(each[n].double() for each in again) / SIZE for n in shapes}
        other.give(again, exact=True)
        for n in shapes:
            torch.testing.assert_close(again[0][n].double(), dense[n])
            assert torch.equal(again[0][n], again[1][n]) and torch.equal(expected[0][n], given[0][n])
        assert_same(other.reducers[0].state.state_dict(), kept)
        straight.end_step()
        other.end_step()
        for a, b in zip(straight.reducers, other.reducers):
            assert_same(a.state_dict(), b.state_dict())


def test_a_bucket_is_exact_if_any_of_its_gradients_must_be() -> None:
    hosts = Hosts(config("topk"), {n: SHAPES[n] for n in ("conv", "alone")})
    assert len(hosts.plan.buckets) == 1
    given = [{n: draw(n, rank) for n in ("conv", "alone")} for rank in range(SIZE)]
    for filling, each in zip(hosts.fillings, given):
        filling.give("alone", each["alone"], exact=True)
        filling.give("conv", each["conv"])
    for reducer in hosts.reducers:
        reducer.progress()
    for filling in hosts.fillings:
        filling.collect()
    torch.testing.assert_close(given[0]["conv"], (draw("conv", 0) + draw("conv", 1)) / 2)


def test_what_a_rank_lacks_counts_as_zero_and_its_residual_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ZeroTensors, "names", lambda *_: frozenset())  # as on a GPU, where nobody looks
    shapes = {n: SHAPES[n] for n in ("conv", "alone")}
    hosts = Hosts(config("topk", ratio=10.0), shapes)
    for step in range(2):
        hosts.give([{n: draw(n, rank, step) for n in shapes} for rank in range(SIZE)])
        hosts.end_step()
    before = [reducer.state_dict()["vectors"]["residual"] for reducer in hosts.reducers]
    given = [
        {n: draw(n, rank, 9) if (rank, n) != (1, "conv") else torch.zeros(shapes[n][0]) for n in shapes}
        for rank in range(SIZE)
    ]
    assert hosts.fillings[0].missing() == ["alone", "conv"]
    hosts.give(given, absent=[(), ("conv",)])
    hosts.end_step()
    after = [reducer.state_dict()["vectors"]["residual"] for reducer in hosts.reducers]
    assert_same(after[1]["conv"], before[1]["conv"])
    assert not torch.equal(after[1]["alone"][0], before[1]["alone"][0])
    assert not torch.equal(after[0]["conv"][0], before[0]["conv"][0])
    assert torch.equal(given[0]["conv"], given[1]["conv"]) and given[0]["conv"].any()


def test_gradients_may_come_in_any_order_and_are_forgotten_after_an_abort() -> None:
    hosts = Hosts(config("topk"))
    filling = hosts.fillings[0]
    filling.give("conv", draw("conv", 0))
    assert "conv" not in filling.missing() and "alone" in filling.missing()
    filling.clear()
    assert sorted(filling.missing()) == sorted(SHAPES)


def test_where_order_is_a_contract_buckets_start_in_the_order_of_the_plan() -> None:
    shapes = {f"w{i}": ((30, 40), torch.float32) for i in range(5)}
    cfg = config("topk", bucket_mb=0.004)
    plan = plan_of(cfg, shapes)
    assert len(plan.buckets) == 5
    world = OrderedWorld(3)

    def run(rank: int, transport: OrderedTransport) -> list[str]:
        reducer = Reducer(cfg, transport)
        fillings, order = Fillings(plan, reducer), random.Random(rank)
        for step in range(3):
            for name in order.sample(list(shapes), len(shapes)):
                fillings.give(name, draw(name, rank, step, shapes))
            fillings.collect()
            reducer.end_step()
        return [operation[0].split("#")[0] for operation in world.issued[rank]]

    for issued in world.each(run):
        assert issued == [f"{bucket.id:08x}" for bucket in plan.buckets] * 3


def watch(monkeypatch: pytest.MonkeyPatch) -> None:
    """The scalers that this test makes, and no others."""
    monkeypatch.setattr(torch.amp.GradScaler, "__init__", torch.amp.GradScaler.__init__)  # `watch` replaces it
    monkeypatch.setattr(loss_scale, "_scalers", weakref.WeakSet())
    loss_scale.watch()


@pytest.mark.parametrize("name", [n for n in registry.names() if config(n).scheme.memory])
def test_residuals_are_in_units_of_the_unscaled_loss(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Powers of two: what is scaled and what is not are the same bits, whatever the scaler does between steps."""
    watch(monkeypatch)
    shapes = {n: SHAPES[n] for n in ("conv", "alone")}
    plain, scaled = Hosts(config(name), shapes), Hosts(config(name), shapes)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=1, growth_factor=8.0)
    for step in range(5):
        loose = torch.nn.Parameter(torch.ones(1))
        optimizer = torch.optim.SGD([loose], 0.1)
        scale = float(scaler.scale(torch.ones(())))
        assert scale == 2.0 ** (10 + 3 * step)
        given = [{n: draw(n, rank, step, shapes) * scale for n in shapes} for rank in range(SIZE)]
        scaled.give(given)
        scaled.end_step()
        with monkeypatch.context() as unscaled:
            unscaled.setattr(loss_scale, "current", lambda: None)
            expected = [{n: draw(n, rank, step, shapes) for n in shapes} for rank in range(SIZE)]
            plain.give(expected)
            plain.end_step()
        for n in shapes:
            assert torch.equal(given[0][n], expected[0][n] * scale)
        for a, b in zip(plain.reducers, scaled.reducers):
            assert_same(a.state_dict(), b.state_dict())
        loose.grad = torch.ones(1)
        scaler.step(optimizer)
        scaler.update()


def test_with_two_scalers_nobody_can_know_and_a_line_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    watch(monkeypatch)
    loss_scale._say_once.cache_clear()
    scalers = [torch.amp.GradScaler("cpu", init_scale=4.0 * (i + 1)) for i in range(2)]
    assert loss_scale.current() is None, "no loss has been scaled yet"
    scalers[0].scale(torch.ones(()))
    assert float(loss_scale.current()) == 4
    scalers[1].scale(torch.ones(()))
    assert loss_scale.current() is None and loss_scale.current() is None
    assert caplog.text.count("several GradScalers") == 1
    loss_scale._say_once.cache_clear()
