"""Law 7: state survives a resume, a skipped step and another number of ranks; it follows names, not buckets."""

from __future__ import annotations

import io

import pytest
import torch

from compression_plugins import registry
from compression_plugins.plan import Bucket
from compression_plugins.reducer import reshard
from compression_plugins.schemes.base import Segment
from compression_plugins.state import State

from ..world import World, config, mean

SCHEMES = registry.names()


@pytest.mark.parametrize("name", SCHEMES)
def test_a_loaded_state_continues_bit_for_bit(name: str) -> None:
    uninterrupted, first = World(config(name), 2), World(config(name), 2)
    for step in range(4):
        uninterrupted.step(uninterrupted.gradients(step))
        first.step(first.gradients(step))
    second = World(config(name), 2)
    for old, new in zip(first.reducers, second.reducers):
        file = io.BytesIO()
        torch.save(old.state_dict(), file)
        file.seek(0)
        new.load_state_dict(torch.load(file, weights_only=True))
    for step in range(4, 9):
        expected = uninterrupted.step(uninterrupted.gradients(step))
        assert all(map(torch.equal, second.step(second.gradients(step)), expected))


@pytest.mark.parametrize("name", SCHEMES)
def test_a_skipped_step_leaves_no_trace(name: str) -> None:
    straight, skipping = World(config(name), 2, undo=True), World(config(name), 2, undo=True)
    for step in range(5):
        expected = straight.step(straight.gradients(step))
        overflow = [torch.full_like(g, torch.inf) if step == 2 else g * 1e3 for g in skipping.gradients(99)]
        skipping.step(overflow, skipped=True)
        assert all(map(torch.equal, skipping.step(skipping.gradients(step)), expected))


@pytest.mark.parametrize("name", [n for n in SCHEMES if config(n).scheme.memory])
@pytest.mark.parametrize("new_size", [1, 2, 5])
def test_on_another_number_of_ranks_the_owed_update_is_the_same(name: str, new_size: int) -> None:
    old = World(config(name), 3)
    for step in range(4):
        old.step(old.gradients(step))
    state = reshard([r.state_dict() for r in old.reducers])
    new = World(config(name), new_size)
    for reducer in new.reducers:
        reducer.load_state_dict(state)
    torch.testing.assert_close(new.memory(), old.memory(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", SCHEMES)
def test_warm_up_steps_are_the_exact_mean(name: str) -> None:
    world = World(config(name, warmup_steps=2), 2)
    for step in range(2):
        gradients = world.gradients(step)
        torch.testing.assert_close(world.step(gradients)[0].double(), mean(gradients), rtol=1e-6, atol=1e-6)
    for step in (2, 3):  # Marsit begins with a flush
        world.step(world.gradients(step))
    assert (world.memory().norm() > 0) == (world.bucket.scheme.memory is not None), "then compression begins"


def bucket(*pieces: tuple[str, int, int]) -> Bucket:
    return Bucket(registry.get("topk")(), tuple(Segment(*piece) for piece in pieces))


def test_memory_follows_elements_into_other_buckets() -> None:
    state = State()
    state.residual(bucket(("a", 0, 4), ("b", 0, 3))).copy_(torch.arange(7.0))
    assert state.residual(bucket(("b", 0, 3), ("a", 0, 4))).tolist() == [4, 5, 6, 0, 1, 2, 3]
    assert state.residual(bucket(("a", 2, 2), ("b", 0, 1))).tolist() == [2, 3, 4]
    state.residual(bucket(("a", 2, 2), ("b", 0, 1))).mul_(10)
    assert state.residual(bucket(("a", 0, 4), ("b", 0, 3))).tolist() == [0, 1, 20, 30, 40, 5, 6]


def test_a_bucket_that_stays_keeps_its_memory_in_place() -> None:
    state = State()
    one = bucket(("a", 0, 4))
    assert state.residual(one).data_ptr() == state.residual(bucket(("a", 0, 4))).data_ptr()


def test_a_skipped_step_leaves_no_trace_when_buckets_changed_within_it() -> None:
    state = State(undoable=True)
    state.residual(bucket(("a", 0, 4), ("b", 0, 3))).copy_(torch.arange(7.0))
    state.commit()
    state.residual(bucket(("a", 0, 4), ("b", 0, 3))).mul_(-1)  # two micro-batches with different buckets
    state.residual(bucket(("b", 0, 3), ("a", 2, 2))).fill_(9)
    state.residual(bucket(("new", 0, 2))).fill_(1)
    state.rollback()
    assert state.residual(bucket(("a", 0, 4), ("b", 0, 3))).tolist() == [0, 1, 2, 3, 4, 5, 6]
    assert state.residual(bucket(("new", 0, 2))).tolist() == [0, 0]


def test_memories_beside_the_residual_follow_elements_and_undo_alike_but_apart_from_it() -> None:
    state = State(undoable=True)
    state.vector("momentum", bucket(("a", 0, 4), ("b", 0, 3))).copy_(torch.arange(7.0))
    state.commit()
    assert not state.residual(bucket(("a", 0, 4))).any() and state.norm() == 0
    assert state.vector("momentum", bucket(("a", 2, 2), ("b", 0, 1))).tolist() == [2, 3, 4]
    state.vector("momentum", bucket(("a", 0, 4))).mul_(-1)
    state.vector("new", bucket(("a", 0, 4))).fill_(1)
    state.rollback()
    assert state.vector("momentum", bucket(("b", 0, 3), ("a", 0, 4))).tolist() == [4, 5, 6, 0, 1, 2, 3]
    assert not state.vector("new", bucket(("a", 0, 4))).any()
    other = State()
    other.load_state_dict(state.state_dict())
    assert other.vector("momentum", bucket(("a", 0, 4))).tolist() == [0, 1, 2, 3]
    assert other.nbytes() == state.nbytes()


def test_a_state_from_before_there_were_other_memories_is_read() -> None:
    state = State()
    state.load_state_dict({"residuals": {"a": {0: torch.ones(4)}}, "tensors": {}})
    assert state.residual(bucket(("a", 0, 4))).tolist() == [1] * 4
    assert not state.vector("momentum", bucket(("a", 0, 4))).any()
