"""Two levels: nodes average dense, parts of what they share meet across nodes as if nodes were the ranks."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from compression_plugins.core.call import Segment
from compression_plugins.engine.levels import Levels
from compression_plugins.engine.parts import collect, dealt, part_of
from compression_plugins.engine.plan import Bucket, TensorSpec, make_plan
from compression_plugins.engine.reducer import Reducer
from compression_plugins.engine.state import EVERY, reshard
from compression_plugins.errors import UnsupportedError

from ..ordered import OrderedWorld, same_order
from ..world import SHAPES, World, assert_same, config, mean
from .test_reduction import CASES, WITH_MEMORY

CODED = [case for case in CASES if case.values[0] != "none"]
REMEMBERING = [case for case in CODED if case.values[0] in WITH_MEMORY]
SIZES = [(4, 2), (6, 2), (6, 3)]  # ranks, ranks of a node


def world_of(name: str, size: int, node: int, shapes: Any = SHAPES, **keys: Any) -> World:
    world = World(config(name, levels=node, **keys), size, shapes)
    for reducer in world.reducers:
        reducer.form_levels()
    return world


def whole(name: str, size: int) -> World:
    return World(config(name), size)


def owed(world: World) -> Tensor:
    """What all ranks together still owe to the averaged update, float64."""
    residuals = reshard([reducer.state_dict() for reducer in world.reducers])["vectors"].get("residual", {})
    parts = [residuals.get(s.name, {0: torch.zeros(s.numel)})[0][: s.numel] for s in world.bucket.segments]
    return torch.cat(parts).double()


def node_means(gradients: Sequence[Tensor], node: int) -> list[Tensor]:
    return [torch.stack(list(gradients[i : i + node])).sum(0) / node for i in range(0, len(gradients), node)]


@pytest.mark.parametrize(("size", "node"), SIZES)
@pytest.mark.parametrize(("name", "variant"), CODED)
def test_each_part_is_what_the_scheme_makes_of_the_nodes_means(name: str, variant: dict, size: int, node: int) -> None:
    """Bit for bit, over steps; with that all ranks agree, and each remembers its own part and no more."""
    world = world_of(name, size, node, **variant)
    flat = [World(config(name, **variant), size // node) for _ in range(node)]
    lengths = [s.numel for s in world.reducers[0].levels.part(world.bucket).segments]  # type: ignore[union-attr]
    for step in range(4):
        gradients = world.gradients(step)
        expected = []
        for index, other in enumerate(flat):
            bucket = world.reducers[index].levels.part(world.bucket)  # type: ignore[union-attr]
            parts = [dealt(world.bucket.segments, lengths, m, node) for m in node_means(gradients, node)]
            other.plan = replace(other.plan, buckets=(bucket,))
            expected.append(other.step([each.view(node, -1)[index] for each in parts])[0])
        wanted = torch.empty(world.bucket.numel)
        collect(world.bucket.segments, lengths, torch.stack(expected), wanted)
        assert all(torch.equal(result, wanted) for result in world.step(gradients))
    for rank, reducer in enumerate(world.reducers):
        assert_same(reducer.state.state_dict(), flat[rank % node].reducers[rank // node].state.state_dict())


@pytest.mark.parametrize(("size", "node"), SIZES)
@pytest.mark.parametrize(("name", "variant"), REMEMBERING)
def test_what_was_sent_plus_what_is_remembered_is_what_came_in(name: str, variant: dict, size: int, node: int) -> None:
    world, decay = world_of(name, size, node, **variant), variant.get("decay", 1.0)
    came = torch.zeros(world.bucket.numel, dtype=torch.float64)
    sent = torch.zeros_like(came)
    for step in range(6):
        gradients = world.gradients(step)
        came += mean(gradients) - (1 - decay) * owed(world)
        sent += world.step(gradients)[0].double()
        torch.testing.assert_close(sent + owed(world), came, rtol=0, atol=2e-5)
    assert owed(world).norm() > 0, "else nothing was left to remember"


@pytest.mark.parametrize(("size", "node"), SIZES)
@pytest.mark.parametrize(("name", "variant"), CODED)
def test_the_plan_says_what_the_transport_counts(name: str, variant: dict, size: int, node: int) -> None:
    world, steps = world_of(name, size, node, **variant), 3
    for step in range(steps):
        world.step(world.gradients(step))
    counted = sum(transport.sent for transport in world.local.transports) / size / steps
    assert counted == pytest.approx(world.bucket.wire_bytes(size, node), rel=1e-9)
    assert not world.reducers[0].ledger.report(1)
    dense = 2 * 4 * world.bucket.numel * (node - 1) / node
    assert world.bucket.inside_bytes(node) == pytest.approx(dense, rel=0.04), "parts are filled up to whole rows"


@pytest.mark.parametrize("name", ["topk", "qsgd", "marsit"])
def test_of_one_node_the_average_is_exact_and_nothing_is_remembered(name: str) -> None:
    world = world_of(name, 4, 4)
    gradients = world.gradients(0)
    torch.testing.assert_close(world.step(gradients)[2].double(), mean(gradients), rtol=1e-6, atol=1e-6)
    assert not world.reducers[0].state_dict()["vectors"]
    assert "all 4 ranks are of one node" in world.plan.table(4, node=4)


@pytest.mark.parametrize(("new_size", "levels"), [(1, None), (3, None), (4, 2), (6, 2), (6, 3), (8, 4)])
@pytest.mark.parametrize("name", WITH_MEMORY)
def test_in_another_world_the_owed_update_is_the_same(name: str, new_size: int, levels: int | None) -> None:
    old = world_of(name, 4, 2)
    for step in range(4):
        old.step(old.gradients(step))
    state = reshard([reducer.state_dict() for reducer in old.reducers])
    new = world_of(name, new_size, levels) if levels else whole(name, new_size)
    for reducer in new.reducers:
        reducer.load_state_dict(state)
    before = owed(new)
    torch.testing.assert_close(before, owed(old), rtol=0, atol=1e-6)
    gradients = new.gradients(9)
    sent = new.step(gradients)[0].double()
    torch.testing.assert_close(sent + owed(new), before + mean(gradients), rtol=0, atol=1e-5)


@pytest.mark.parametrize("node", [2, 3])
@pytest.mark.parametrize("name", WITH_MEMORY)
def test_a_loaded_state_continues_bit_for_bit(name: str, node: int) -> None:
    """Also where parts are filled up behind the end of a tensor, of which nothing is saved."""
    shapes = {**SHAPES, "bias": (35,)}
    rules = [{"match": "bias", "scheme": name}]  # whose end is in the middle of a row
    one, other = (world_of(name, 6, node, shapes, rules=rules) for _ in range(2))
    for step in range(3):
        one.step(one.gradients(step))
    for old, new in zip(one.reducers, other.reducers):
        state = old.state_dict()
        for name, pieces in state["vectors"].get("residual", {}).items():
            assert all(start + len(piece) <= one.weights[name].numel() for start, piece in pieces.items())
        new.load_state_dict(state)
    for step in range(3, 6):
        assert all(map(torch.equal, other.step(other.gradients(step)), one.step(one.gradients(step))))


def test_other_nodes_than_those_of_the_state_begin_anew_aloud(caplog: pytest.LogCaptureFixture) -> None:
    old = world_of("topk", 6, 2)
    old.step(old.gradients(0))
    states = [reducer.state_dict() for reducer in old.reducers]
    for new in (world_of("topk", 6, 3), whole("topk", 6)):
        for reducer, state in zip(new.reducers, states):
            reducer.load_state_dict(state)
            reducer.form_levels()
        assert not owed(new).any() and new.reducers[0].step == 1
        assert caplog.text.count("saved by nodes of 2 ranks") == 1
        caplog.clear()


@pytest.mark.parametrize("name", [*WITH_MEMORY, "signsgd"])
def test_a_layer_without_gradients_rests_and_keeps_its_memory(name: str) -> None:
    world = world_of(name, 4, 2)
    first = world.bucket.segments[0]
    for step in range(3):
        world.step(world.gradients(step))
    before = owed(world)[: first.numel]
    for step in range(3, 6):
        gradients = world.gradients(step)
        for gradient in gradients:
            gradient[: first.numel] = 0
        assert not world.step(gradients)[0][: first.numel].any()
    assert torch.equal(owed(world)[: first.numel], before)


@pytest.mark.parametrize("kind", ["momentum", "frozen_adam"])
def test_a_direction_is_formed_of_all_ranks_and_averaged_on_two_levels(kind: str) -> None:
    world = world_of("topk", 4, 2, direction=kind, warmup_steps=2)
    for step in range(5):
        first, *others = world.step(world.gradients(step))
        assert all(torch.equal(first, other) for other in others) and first.isfinite().all()
    assert world.plan.memory_bytes(2) == 2 * sum(
        4 * piece.numel()
        for named in world.reducers[0].state_dict()["vectors"].values()
        for pieces in named.values()
        for piece in pieces.values()
    )


def test_a_gradient_that_is_not_finite_is_no_ranks_secret_and_leaves_no_trace_in_a_shared_memory() -> None:
    world = world_of("topk", 4, 2, direction="frozen_adam", warmup_steps=1)
    for step in range(3):
        world.step(world.gradients(step))
    before = owed(world)
    gradients = world.gradients(3)
    gradients[1][:] = float("inf")
    assert all(not result.isfinite().any() for result in world.reduce(gradients))
    for reducer in world.reducers:
        reducer.end_step()
    assert torch.equal(owed(world), before)


@pytest.mark.parametrize("name", ["scalecom", "marsit", "powersgd", "ef_signsgd"])
@pytest.mark.parametrize("seed", range(3))
def test_every_rank_issues_the_operations_of_each_group_in_one_order(name: str, seed: int) -> None:
    """Two buckets and more in flight, of other lengths, over a transport where order is a contract."""
    shapes = {f"w{i}": (5 + 16 * i, 64) for i in range(4)}
    settings = config(name, levels=2, bucket_mb=0.003)
    plan = make_plan(settings, [TensorSpec(key, shape, "float32") for key, shape in shapes.items()])
    assert len(plan.buckets) == 4
    world = OrderedWorld(4, seed)

    def run(rank: int, transport: Any) -> list[Tensor]:
        reducer, results = Reducer(settings, transport), []
        reducer.form_levels()
        for step in range(3):
            generator = torch.Generator().manual_seed(7 * step + rank)
            works = [reducer.start(b, torch.randn(b.numel, generator=generator)) for b in plan.buckets]
            results += [work.result() for work in works]
            reducer.end_step()
        return results

    first, *others = world.each(run)
    assert all(all(map(torch.equal, first, other)) for other in others)
    for group in world.groups.values():
        assert same_order(group)  # type: ignore[arg-type]


@given(rows=st.integers(0, 40), row=st.sampled_from([0, 1, 3, 8]), start=st.integers(0, 3), node=st.integers(1, 5))
def test_parts_cover_a_tensor_once_and_come_back(rows: int, row: int, start: int, node: int) -> None:
    shape = None if start else (rows, row) if row else (rows,)  # a piece of a tensor has none
    segment = Segment("w", start * max(row, 1), rows * max(row, 1), shape, row)
    parts = [part_of(segment, node, index) for index in range(node)]
    places = [place for part in parts for place in range(part.start, part.start + part.numel)]
    wanted = range(segment.start, segment.start + segment.numel)
    assert len({part.numel for part in parts}) == 1 and places[: segment.numel] == list(wanted)
    assert len(places) == len(set(places)), "nobody owns what another one does"
    x, out = torch.arange(float(segment.numel)), torch.empty(segment.numel)
    shared = dealt([segment], [parts[0].numel], x, node).view(node, -1)
    for part, values in zip(parts, shared):
        held = x[part.start - segment.start :][: part.numel]
        assert torch.equal(values[: len(held)], held) and not values[len(held) :].any()
    collect([segment], [parts[0].numel], shared, out)
    assert torch.equal(out, x)


def test_large_matrices_are_cut_between_rows_and_keep_a_shape() -> None:
    matrix = part_of(Segment("w", 0, 64 * 10, (64, 2, 5), 10), 4, 3)
    assert matrix == Segment("w", 48 * 10, 16 * 10, (16, 2, 5), 10)
    assert part_of(Segment("b", 0, 10, (10,), 0), 4, 3) == Segment("b", 9, 3, None, 0), "filled up at the end"


def test_nodes_that_cannot_be_made_are_refused() -> None:
    with pytest.raises(UnsupportedError, match="levels: 4: 6 ranks cannot be divided into nodes of 4; valid: 2, 3, 6"):
        world_of("topk", 6, 4)
    with pytest.raises(UnsupportedError, match="rows: 3 cannot be made of 2 ranks"):
        world_of("marsit", 6, 3, form="torus", rows=3)
    world = world_of("qsgd", 4, 2)
    with pytest.raises(UnsupportedError, match="where each rank keeps a shard of it"):
        world.reduce(world.gradients(0), shards=[world.bucket.numel, 0, 0, 0])


def test_the_table_says_what_crosses_nodes() -> None:
    world = world_of("qsgd", 4, 2)
    across = world.bucket.wire_bytes(4, 2) - world.bucket.inside_bytes(2)
    assert f"levels: 2 nodes of 2 ranks, {across / 1e6:.3f} MB per step and rank of it across" in world.plan.table(
        4, node=2
    )


def test_a_state_for_any_world_says_so() -> None:
    world = world_of("topk", 4, 2)
    world.step(world.gradients(0))
    assert [reducer.state_dict()["node"] for reducer in world.reducers] == [2] * 4
    assert reshard([reducer.state_dict() for reducer in world.reducers])["node"] == EVERY


def test_tensors_that_travel_as_they_are_are_averaged_at_once() -> None:
    world = World(config("topk", levels=2, exempt=["second*"]), 4)
    for reducer in world.reducers:
        reducer.form_levels()
    dense: Bucket = next(bucket for bucket in world.plan.buckets if bucket.scheme.host_dense)
    assert dense.wire_bytes(4, 2) == dense.wire_bytes(4) and not dense.inside_bytes(2)


@pytest.mark.parametrize("hosts", [["a", "b", "a", "b"], ["a", "a", "a", "b"]], ids=["alike", "uneven"])
def test_ranks_of_one_host_are_a_node_whatever_their_numbers(hosts: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    world, place = OrderedWorld(4), threading.local()
    monkeypatch.setattr("compression_plugins.engine.levels.socket.gethostname", lambda: place.host)

    def run(rank: int, transport: Any) -> tuple[Any, ...]:
        place.host = hosts[rank]
        levels = Levels(transport, "node")
        return levels.node, levels.nodes, levels.inner.rank, levels.outer.rank

    if hosts.count("a") == 2:
        assert world.each(run) == [(2, 2, 0, 0), (2, 2, 0, 1), (2, 2, 1, 0), (2, 2, 1, 1)]
    else:
        with pytest.raises(
            UnsupportedError, match="levels: node: nodes must have as many ranks each, and here have 3, 1"
        ):
            world.each(run)
