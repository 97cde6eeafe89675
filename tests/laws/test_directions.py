"""Local directions: what torch's optimizers make of one rank's gradient, before Marsit compresses it."""

from __future__ import annotations

import io

import pytest
import torch
from torch import Tensor

from compression_plugins.engine.plan import TensorSpec, make_plan
from compression_plugins.engine.reducer import Reducer
from compression_plugins.engine.state import reshard
from compression_plugins.errors import UnsupportedError
from compression_plugins.transports.local import LocalWorld, drive

from ..world import World, config, mean

DIRECTIONS = ["momentum", "adam"]


class Oracle:
    """Directions of torch's own optimizers, one a rank: what a step with learning rate 1 takes from the weights."""

    def __init__(self, direction: str, size: int, numel: int) -> None:
        self.weights = [torch.zeros(numel, requires_grad=True) for _ in range(size)]
        make = {
            "momentum": lambda w: torch.optim.SGD([w], lr=1.0, momentum=0.9),
            "adam": lambda w: torch.optim.Adam([w], lr=1.0),
        }[direction]
        self.optimizers = [make(w) for w in self.weights]

    def __call__(self, gradients: list[Tensor], skip: int | None = None) -> list[Tensor]:
        """Of every rank but `skip`, whose optimizer does not see its gradient."""
        found = []
        for rank, (w, optimizer, gradient) in enumerate(zip(self.weights, self.optimizers, gradients)):
            if rank == skip:
                continue
            with torch.no_grad():
                w.zero_()
            w.grad = gradient.clone()
            optimizer.step()
            found.append(-w.detach().clone())
        return found


@pytest.mark.parametrize("size", [1, 2, 4])
def test_exact_averages_of_momentum_are_sgd_with_momentum_on_the_averaged_gradient(size: int) -> None:
    """Momentum is linear in the gradient, so it may stand before the average."""
    world = World(config("marsit", flush_steps=1, direction="momentum"), size)
    weights, expected = (torch.zeros(world.bucket.numel, requires_grad=True) for _ in range(2))
    plain = torch.optim.SGD([weights], lr=0.1)
    optimizer = torch.optim.SGD([expected], lr=0.1, momentum=0.9)
    for step in range(10):
        gradients = world.gradients(step)
        weights.grad, expected.grad = world.step(gradients)[0], mean(gradients).float()
        plain.step()
        optimizer.step()
        torch.testing.assert_close(weights, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("size", [1, 3])
def test_exact_averages_are_the_mean_of_the_ranks_own_directions(direction: str, size: int) -> None:
    world = World(config("marsit", flush_steps=1, direction=direction), size)
    oracle = Oracle(direction, size, world.bucket.numel)
    for step in range(10):
        gradients = world.gradients(step)
        torch.testing.assert_close(world.step(gradients)[0].double(), mean(oracle(gradients)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("form", ["one_hot", "ring", "torus"])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_what_was_sent_plus_what_is_remembered_are_the_directions(direction: str, form: str) -> None:
    world = World(config("marsit", direction=direction, form=form), 4)
    oracle = Oracle(direction, 4, world.bucket.numel)
    came_in = torch.zeros(world.bucket.numel, dtype=torch.float64)
    sent = torch.zeros_like(came_in)
    for step in range(8):
        gradients = world.gradients(step)
        came_in += mean(oracle(gradients))
        sent += world.step(gradients)[0]
        torch.testing.assert_close(sent + world.memory(), came_in, rtol=0, atol=1e-4)
    assert world.memory().norm() > 0


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("flush_steps", [1, 3])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_a_gradient_that_is_not_finite_leaves_the_moments_of_its_rank_as_they_were(
    direction: str, flush_steps: int, bad: float
) -> None:
    world = World(config("marsit", flush_steps=flush_steps, direction=direction), 2)
    oracle = Oracle(direction, 2, world.bucket.numel)
    for step in range(6):
        gradients = world.gradients(step)
        before = moments(world.reducers[1])
        if step in (0, 3):
            gradients[1][17] = bad
            oracle(gradients, skip=1)
        results = world.step(gradients)
        after = moments(world.reducers[1])
        if step == 0:
            assert all(result.isnan().any() for result in results)
            assert not any(tensor.any() for tensor in after)
        elif step == 3:
            assert all(result.isnan().any() for result in results)
            assert all(map(torch.equal, before, after)) and all(tensor.any() for tensor in after)
        elif flush_steps == 1:
            torch.testing.assert_close(results[0].double(), mean(oracle(gradients)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_moments_are_saved_and_continue_bit_for_bit(direction: str) -> None:
    worlds = [World(config("marsit", direction=direction), 2) for _ in range(2)]
    for step in range(4):
        for world in worlds:
            world.step(world.gradients(step))
    resumed = World(config("marsit", direction=direction), 2)
    for old, new in zip(worlds[1].reducers, resumed.reducers):
        file = io.BytesIO()
        torch.save(old.state_dict(), file)
        file.seek(0)
        new.load_state_dict(torch.load(file, weights_only=True))
    for step in range(4, 9):
        expected = worlds[0].step(worlds[0].gradients(step))
        assert all(map(torch.equal, resumed.step(resumed.gradients(step)), expected))


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_a_skipped_step_leaves_no_trace_in_the_moments(direction: str) -> None:
    straight, skipping = (World(config("marsit", direction=direction), 2) for _ in range(2))
    for step in range(5):
        expected = straight.step(straight.gradients(step))
        overflow = [torch.full_like(g, torch.inf) if step == 2 else g * 1e3 for g in skipping.gradients(99)]
        skipping.step(overflow, skipped=True)
        assert all(map(torch.equal, skipping.step(skipping.gradients(step)), expected))


def test_on_another_number_of_ranks_every_rank_starts_from_the_mean_momentum() -> None:
    old = World(config("marsit", flush_steps=1, direction="momentum"), 3)
    whole = World(config("marsit", flush_steps=1, direction="momentum"), 1)
    for step in range(4):
        gradients = old.gradients(step)
        old.step(gradients)
        whole.step([mean(gradients).float()])
    state = reshard([r.state_dict() for r in old.reducers])
    new = World(config("marsit", flush_steps=1, direction="momentum"), 2)
    for reducer in new.reducers:
        reducer.load_state_dict(state)
    gradients = new.gradients(9)
    torch.testing.assert_close(new.step(gradients)[0], whole.step([mean(gradients).float()])[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_exempt_tensors_and_warm_up_steps_get_directions_too(direction: str) -> None:
    """The script's optimizer is plain SGD: a raw gradient would be the wrong step for it."""
    cfg = config("marsit", direction=direction, warmup_steps=2, flush_steps=100)
    plan = make_plan(cfg, [TensorSpec("weight", (6, 7), "float32"), TensorSpec("bias", (6,), "float32")])
    matrix, bias = sorted(plan.buckets, key=lambda bucket: -bucket.numel)
    assert (matrix.scheme.memory is None, bias.scheme.memory is None) == (False, True)
    reducers = [Reducer(cfg, transport) for transport in LocalWorld(2).transports]
    oracles = {bucket: Oracle(direction, 2, bucket.numel) for bucket in plan.buckets}
    generator = torch.Generator().manual_seed(0)
    for step in range(4):
        for bucket in plan.buckets:
            gradients = [torch.randn(bucket.numel, generator=generator) for _ in range(2)]
            jobs = [reducer.start(bucket, g.clone()) for reducer, g in zip(reducers, gradients)]
            drive(jobs)
            expected = mean(oracles[bucket](gradients))
            if bucket is bias or step < 2:
                torch.testing.assert_close(jobs[0].result().double(), expected, rtol=1e-5, atol=1e-5)
        for reducer in reducers:
            reducer.end_step()


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_two_gradients_in_one_step_are_refused(direction: str) -> None:
    world = World(config("marsit", direction=direction), 1)
    world.reduce(world.gradients(0))
    with pytest.raises(UnsupportedError, match="one gradient per step.*ZeRO stage 0 or 1"):
        world.reduce(world.gradients(1))


def moments(reducer: Reducer) -> list[Tensor]:
    """Copies of all that a direction keeps."""
    saved = reducer.state_dict()
    kept = [*saved["vectors"].values(), {"clock": saved["tensors"].get("adam_clock", {})}]
    return [tensor for slot in kept for tensors in slot.values() for tensor in tensors.values()]
