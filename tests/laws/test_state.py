"""Law 7: state survives a resume and another number of ranks; it follows names, not buckets."""

from __future__ import annotations

import io

import pytest
import torch

from compression_plugins.core.call import Segment
from compression_plugins.engine.plan import Bucket
from compression_plugins.engine.state import State, reshard
from compression_plugins.schemes import registry

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


def residual(state: State, bucket: Bucket) -> torch.Tensor:
    return state.vector("residual", bucket).new


def momentum(state: State, bucket: Bucket) -> torch.Tensor:
    return state.vector("momentum", bucket).new


def test_memory_follows_elements_into_other_buckets() -> None:
    state = State()
    residual(state, bucket(("a", 0, 4), ("b", 0, 3))).copy_(torch.arange(7.0))
    assert residual(state, bucket(("b", 0, 3), ("a", 0, 4))).tolist() == [4, 5, 6, 0, 1, 2, 3]
    assert residual(state, bucket(("a", 2, 2), ("b", 0, 1))).tolist() == [2, 3, 4]
    residual(state, bucket(("a", 2, 2), ("b", 0, 1))).mul_(10)
    assert residual(state, bucket(("a", 0, 4), ("b", 0, 3))).tolist() == [0, 1, 20, 30, 40, 5, 6]


def test_the_norm_is_that_of_all_residuals() -> None:
    state, values = State(), torch.randn(100_000, generator=torch.Generator().manual_seed(0))
    residual(state, bucket(("a", 0, 60_000), ("b", 0, 40_000))).copy_(values)
    momentum(state, bucket(("a", 0, 60_000))).fill_(7)
    state.commit()
    assert state.norm() == pytest.approx(float(values.double().norm()), rel=1e-6)


def test_a_bucket_that_stays_keeps_its_memory_in_place() -> None:
    state = State()
    one = bucket(("a", 0, 4))
    assert residual(state, one).data_ptr() == residual(state, bucket(("a", 0, 4))).data_ptr()


def test_a_skipped_step_leaves_no_trace_when_buckets_changed_within_it() -> None:
    state = State()
    residual(state, bucket(("a", 0, 4), ("b", 0, 3))).copy_(torch.arange(7.0))
    state.commit()
    residual(state, bucket(("a", 0, 4), ("b", 0, 3))).mul_(-1)  # two micro-batches with different buckets
    residual(state, bucket(("b", 0, 3), ("a", 2, 2))).fill_(9)
    residual(state, bucket(("new", 0, 2))).fill_(1)
    state.rollback()
    assert residual(state, bucket(("a", 0, 4), ("b", 0, 3))).tolist() == [0, 1, 2, 3, 4, 5, 6]
    assert residual(state, bucket(("new", 0, 2))).tolist() == [0, 0]


def test_memories_beside_the_residual_follow_elements_and_undo_alike_but_apart_from_it() -> None:
    state = State()
    momentum(state, bucket(("a", 0, 4), ("b", 0, 3))).copy_(torch.arange(7.0))
    state.commit()
    assert not residual(state, bucket(("a", 0, 4))).any() and state.norm() == 0
    assert momentum(state, bucket(("a", 2, 2), ("b", 0, 1))).tolist() == [2, 3, 4]
    momentum(state, bucket(("a", 0, 4))).mul_(-1)
    state.vector("new", bucket(("a", 0, 4))).new.fill_(1)
    state.rollback()
    assert momentum(state, bucket(("b", 0, 3), ("a", 0, 4))).tolist() == [4, 5, 6, 0, 1, 2, 3]
    assert not state.vector("new", bucket(("a", 0, 4))).new.any()
    other = State()
    other.load_state_dict(state.state_dict())
    assert momentum(other, bucket(("a", 0, 4))).tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("copies", [False, True])
def test_a_committed_step_is_kept_whatever_its_buckets_were(copies: bool) -> None:
    state, whole = State(), bucket(("a", 0, 4), ("b", 0, 3))
    first = state.vector("residual", whole, copies)
    first.new.copy_(torch.arange(7.0))
    state.commit()
    second = state.vector("residual", bucket(("b", 0, 3), ("a", 2, 2)), copies)
    second.new.copy_(second.old + 10)
    third = state.vector("residual", bucket(("a", 0, 4)), copies)  # of which the step knows a half
    third.new.copy_(third.old + 100)
    state.commit()
    assert state.kept(whole).tolist() == [100, 101, 112, 113, 14, 15, 16]


def test_what_is_saved_within_a_step_is_what_the_last_one_left() -> None:
    state, one = State(), bucket(("a", 0, 4))
    residual(state, one).fill_(1)
    state.tensor("eta", "a", lambda: torch.zeros(1), "cpu").fill_(1)
    state.commit()
    residual(state, one).fill_(2)
    state.tensor("eta", "a", lambda: torch.zeros(1), "cpu").fill_(2)
    saved = state.state_dict()
    assert saved["vectors"]["residual"]["a"][0].tolist() == [1] * 4 and saved["tensors"]["eta"]["a"].tolist() == [1]
