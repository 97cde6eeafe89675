"""What signs in two stages promise beyond the laws of every scheme: both memories of DoubleSqueeze, and their bits."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from compression_plugins.collectives import payloads
from compression_plugins.engine.state import reshard

from ..world import World, config, mean

BLOCK = 64


@pytest.fixture(autouse=True)
def long_payloads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(payloads, "_WORTH_A_ROUND", 0)


def coded(x: Tensor) -> Tensor:
    """mean|x| * sign(x) of each block of [..., numel]."""
    return torch.cat([torch.where(b >= 0, 1, -1) * b.abs().mean(-1, keepdim=True) for b in x.split(BLOCK, -1)], -1)


@pytest.mark.parametrize("decay", [1.0, 0.9])
@pytest.mark.parametrize("size", [3, 4, 8])
def test_ranks_follow_double_squeeze_with_a_memory_at_the_owner(size: int, decay: float) -> None:
    """The published recursion in float64, the owner's error apart from its residual; its own part is not coded."""
    world = World(config("ef_signsgd", block=BLOCK, decay=decay), size)
    numel = world.bucket.numel
    length = -(-numel // (size * BLOCK)) * BLOCK
    owned = (torch.arange(numel) // length).expand(size, -1) == torch.arange(size)[:, None]
    workers = torch.zeros(size, numel, dtype=torch.float64)
    owner = torch.zeros(numel, dtype=torch.float64)
    for step in range(6):
        gradients = world.gradients(step)
        p = torch.stack(gradients).double() + decay * workers
        q = torch.where(owned, p, coded(p))
        mean_and_error = q.mean(0) + decay * owner
        update = torch.cat([coded(shard) for shard in mean_and_error.split(length)])
        workers, owner = p - q, mean_and_error - update
        for result in world.step(gradients):
            torch.testing.assert_close(result.double(), update, rtol=0, atol=1e-5)
        for rank, reducer in enumerate(world.reducers):
            expected = workers[rank] + torch.where(owned[rank], size * owner, 0)
            torch.testing.assert_close(reducer.state.kept(world.bucket).double(), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("size", [2, 3, 8])
def test_two_stages_send_two_bits_a_value_at_most_and_one_stage_a_bit_for_each_other_rank(size: int) -> None:
    shapes = {"w": (1024, 64)}
    bits = [8 * World(config("ef_signsgd", stages=s, block=1024), size, shapes).bucket.wire_bytes(size) for s in (1, 2)]
    values, marks = 1024 * 64, (size - 1) * 1024
    one = 1 + 32 / 1024
    assert bits[0] == pytest.approx(values * one * (size - 1) + marks)
    stages = 2 * (size - 1) / size if size > 2 else 1
    assert bits[1] == pytest.approx(values * one * stages + marks, rel=0.03)  # shards are whole blocks


def test_what_the_owner_lost_is_still_owed_when_another_rank_owns_it() -> None:
    world = World(config("ef_signsgd", block=BLOCK), 4)
    came_in = sent = torch.zeros(world.bucket.numel, dtype=torch.float64)
    for size in (4, 3, 5):
        if size != world.size:
            state = reshard([reducer.state_dict() for reducer in world.reducers])
            world = World(config("ef_signsgd", block=BLOCK), size)
            for reducer in world.reducers:
                reducer.load_state_dict(state)
        for step in range(3):
            gradients = world.gradients(10 * size + step)
            came_in, sent = came_in + mean(gradients), sent + world.step(gradients)[0]
            torch.testing.assert_close(sent + world.memory(), came_in, rtol=0, atol=2e-5)


@pytest.mark.parametrize("guilty", range(3))
def test_a_block_that_is_not_finite_on_one_rank_changes_no_memory_of_the_owner_or_of_the_guilty(guilty: int) -> None:
    world = World(config("ef_signsgd", block=BLOCK), 3)
    world.step(world.gradients(0))
    before = [reducer.state.kept(world.bucket).clone() for reducer in world.reducers]
    gradients = world.gradients(1)
    gradients[guilty][5] = torch.nan  # rank 0 owns it
    for result in world.step(gradients):
        assert result[:BLOCK].isnan().all() and result[BLOCK:].isfinite().all()
    for rank in {0, guilty}:
        kept = world.reducers[rank].state.kept(world.bucket)
        assert torch.equal(kept[:BLOCK], before[rank][:BLOCK])
    assert all(reducer.state.kept(world.bucket).isfinite().all() for reducer in world.reducers)


def test_memory_stays_bounded_so_that_what_was_applied_comes_near_a_constant_gradient() -> None:
    world = World(config("ef_signsgd", block=BLOCK), 4)
    gradients = world.gradients(0)
    steps = 200
    applied = sum(world.step(gradients)[0].double() for _ in range(steps)) / steps
    assert (applied - mean(gradients)).norm() < 0.1 * mean(gradients).norm()


def test_nothing_is_lost_when_a_step_reduces_a_bucket_twice() -> None:
    """The second time memory is read and written in one place."""
    world = World(config("ef_signsgd", block=BLOCK), 3)
    came_in = sent = torch.zeros(world.bucket.numel, dtype=torch.float64)
    for step in range(3):
        for micro_batch in range(2):
            gradients = world.gradients(10 * step + micro_batch)
            came_in, sent = came_in + mean(gradients), sent + world.reduce(gradients)[0]
        for reducer in world.reducers:
            reducer.end_step()
        torch.testing.assert_close(sent + world.memory(), came_in, rtol=0, atol=2e-5)
