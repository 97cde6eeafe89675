"""Steps that did not happen, and parameters without a gradient, leave memory as it was."""

from __future__ import annotations

import random
from collections.abc import Collection, Sequence

import pytest
import torch
from torch import Tensor

from compression_plugins.engine.absence import ZeroTensors

from ..world import SHAPES, World, assert_same, config, mean, written
from .test_reduction import CASES, WITH_MEMORY

NAMES = list(SHAPES)
IDLE, LIVE = NAMES  # what some ranks have no gradient for, and the other


def part(world: World, flat: Tensor, name: str) -> Tensor:
    """The elements of parameter `name` in a bucket's vector."""
    parts = flat.split([segment.numel for segment in world.bucket.segments])
    return dict(zip((segment.name for segment in world.bucket.segments), parts))[name]


def without(world: World, gradients: Sequence[Tensor], absent: Sequence[Collection[str]]) -> list[Tensor]:
    for gradient, names in zip(gradients, absent):
        for name in names:
            part(world, gradient, name).zero_()
    return list(gradients)


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("way", ["skipped", "dropped"])
@pytest.mark.parametrize(("name", "variant"), CASES)
def test_a_step_that_did_not_happen_leaves_no_trace(name: str, variant: dict, way: str, size: int) -> None:
    """Of several micro-batches, an overflow or an absent parameter among them."""
    straight, other = (World(config(name, **variant), size) for _ in range(2))
    for step in range(5):
        before = [reducer.state_dict() for reducer in other.reducers]
        for micro_batch in range(2):
            gradients = [g * 1e3 for g in other.gradients(90 + micro_batch)]
            if step == 2:
                gradients[0][17] = torch.inf
            absent = [[NAMES[step % 2]], *[[]] * (size - 1)]
            other.reduce(without(other, gradients, absent), absent=absent)
        for reducer in other.reducers:
            reducer.end_step(skipped=True) if way == "skipped" else reducer.drop()
        for reducer, kept in zip(other.reducers, before):
            assert_same(written(reducer.state_dict()), written(kept))
        expected = straight.step(straight.gradients(step))
        assert all(map(torch.equal, other.step(other.gradients(step)), expected))
        for a, b in zip(straight.reducers, other.reducers):
            assert_same(a.state_dict(), b.state_dict())


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("told", [True, False], ids=["told", "found"])
@pytest.mark.parametrize(("name", "variant"), CASES)
def test_what_no_rank_has_comes_back_as_zeros_and_its_memory_stays(
    name: str, variant: dict, told: bool, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`told` by the host, or `found` to be zero everywhere."""
    if told:
        monkeypatch.setattr(ZeroTensors, "names", lambda *_: frozenset())  # as on a GPU, where nobody looks
    world = World(config(name, **variant), size)
    absent = [[IDLE]] * size
    for step in range(6):
        gradients = world.gradients(step)
        if step < 2:
            world.step(gradients)
            continue
        before = [reducer.state_dict()["vectors"] for reducer in world.reducers]
        results = world.reduce(without(world, gradients, absent), absent=absent if told else None)
        for reducer in world.reducers:
            reducer.end_step()
        for result, reducer, kept in zip(results, world.reducers, before):
            assert not part(world, result, IDLE).any()
            assert part(world, result, LIVE).any()
            after = reducer.state_dict()["vectors"]
            for slot, named in kept.items():
                assert_same(after[slot][IDLE], named[IDLE])


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize(("name", "variant"), CASES)
def test_what_some_ranks_lack_is_averaged_with_zeros_to_the_same_bits_everywhere(
    name: str, variant: dict, size: int
) -> None:
    """And with a memory, applied + remembered = came in - decayed, whoever lacks what: that does not decay."""
    world, absence = World(config(name, **variant), size), random.Random(1)
    conserves = name in WITH_MEMORY
    came_in = torch.zeros(world.bucket.numel, dtype=torch.float64)
    sent = torch.zeros_like(came_in)
    for step in range(7):
        absent = [[n for n in NAMES if step and absence.random() < 0.5] for _ in range(size)]
        if step == 1:
            absent = [[], *[NAMES] * (size - 1)]
        gradients = without(world, world.gradients(step), absent)
        before = [reducer.state_dict()["vectors"] for reducer in world.reducers]
        if conserves:
            held = [reducer.state.kept(world.bucket).clone() for reducer in world.reducers]
            came_in -= (1 - variant.get("decay", 1.0)) * mean(without(world, held, absent))
        first, *others = world.reduce(gradients, absent=absent)
        for reducer in world.reducers:
            reducer.end_step()
        assert all(torch.equal(first, other) for other in others)
        came_in += mean(gradients)
        sent += first
        if conserves:
            torch.testing.assert_close(sent + world.memory(), came_in, rtol=0, atol=3e-5)
        for rank, names in enumerate(absent):
            after = world.reducers[rank].state_dict()["vectors"]
            moments = [slot for slot in before[rank] if slot != "residual"]
            for slot, n in ((slot, n) for slot in moments for n in names):
                assert_same(after[slot][n], before[rank][slot][n])
