"""Directions: what an optimizer makes of gradients, before any scheme compresses it. The oracles are plain torch."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from compression_plugins.config import Config
from compression_plugins.engine.plan import TensorSpec, make_plan
from compression_plugins.engine.reducer import Reducer
from compression_plugins.engine.state import reshard
from compression_plugins.optimizer.directions import ZeroOneAdam
from compression_plugins.schemes import registry
from compression_plugins.transports.local import LocalWorld, drive

from ..world import World, assert_same, config, mean
from .directions import (
    ADAMS,
    EVERY,
    LOCAL,
    SETTINGS,
    SHARED,
    SOME,
    UNFILTERED,
    WARM,
    moment,
    moments,
    moments_of,
    residual_of,
    values,
    worlds,
)
from .test_reduction import NOISY, SCHEMES, WITH_MEMORY


class Local:
    """Directions of torch's own optimizers, one a rank: what a step with learning rate 1 takes from the weights."""

    def __init__(self, direction: str, size: int, numel: int) -> None:
        self.weights = [torch.zeros(numel, requires_grad=True) for _ in range(size)]
        make = {
            "momentum": lambda w: torch.optim.SGD([w], lr=1.0, momentum=0.9),
            "adam": lambda w: torch.optim.Adam([w], lr=1.0),
        }[direction]
        self.optimizers = [make(w) for w in self.weights]

    def __call__(self, gradients: Sequence[Tensor], skip: int | None = None) -> list[Tensor]:
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


class Shared:
    """1-bit Adam and 0/1 Adam with exact averages, in fp64, written down once more."""

    def __init__(self, kind: str, numel: int, betas: tuple[float, float] = (0.8, 0.9), eps: float = 1e-8) -> None:
        self.m, self.v = torch.zeros(numel).double(), torch.zeros(numel).double()
        self.kind, self.betas, self.eps, self.steps, self.done = kind, betas, eps, 0, 0

    def __call__(self, gradients: Sequence[Tensor]) -> Tensor:
        (b1, b2), g = self.betas, mean(gradients)
        warm = {"frozen_adam": WARM, "zero_one_adam": 1}[self.kind]
        warming, at = self.done < warm, self.done - warm
        stands_for = 1 if warming else 0 if self.kind == "frozen_adam" or at % 4 else 4
        self.m = b1 * self.m + (1 - b1) * g
        self.v = b2**stands_for * self.v + (1 - b2**stands_for) * g * g
        self.steps += stands_for
        self.done += 1
        top = self.m / (1 - b1**self.done) if warming else self.m
        return torch.where(self.v > 0, top / ((self.v / (1 - b2**self.steps)).sqrt() + self.eps), 0)


# --- exact averages: the optimizers themselves


@pytest.mark.parametrize("scheme", ["none", "marsit"])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_exact_averages_of_momentum_are_sgd_with_momentum_on_the_averaged_gradient(size: int, scheme: str) -> None:
    """Momentum is linear in the gradient, so it may stand before the average."""
    exact = {"flush_steps": 1} if scheme == "marsit" else {}
    world = World(config(scheme, direction={"kind": "momentum", "momentum": 0.7}, **exact), size)
    weights, expected = (torch.zeros(world.bucket.numel, requires_grad=True) for _ in range(2))
    plain = torch.optim.SGD([weights], lr=0.1, weight_decay=0.01)
    optimizer = torch.optim.SGD([expected], lr=0.1, momentum=0.7)
    for step in range(10):
        gradients = world.gradients(step)
        weights.grad, expected.grad = world.step(gradients)[0], mean(gradients).float()
        with torch.no_grad():
            expected.mul_(1 - 0.1 * 0.01)  # the weight decay of plain SGD is decoupled
        plain.step()
        optimizer.step()
        torch.testing.assert_close(weights, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("direction", LOCAL)
@pytest.mark.parametrize("size", [1, 3])
def test_exact_averages_are_the_mean_of_the_ranks_own_directions(direction: str, size: int) -> None:
    world = World(config("none", direction=direction), size)
    oracle = Local(direction, size, world.bucket.numel)
    for step in range(10):
        gradients = world.gradients(step)
        torch.testing.assert_close(world.step(gradients)[0].double(), mean(oracle(gradients)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("size", [1, 3])
def test_a_frozen_variance_is_torchs_adam_before_it_freezes_whatever_the_scheme(size: int, scheme: str) -> None:
    world = World(config(scheme, direction="frozen_adam", warmup_steps=12), size)
    weights, expected = (torch.zeros(world.bucket.numel, requires_grad=True) for _ in range(2))
    plain, adam = torch.optim.SGD([weights], lr=0.01), torch.optim.Adam([expected], lr=0.01)
    for step in range(12):
        gradients = world.gradients(step)
        weights.grad, expected.grad = world.step(gradients)[0], mean(gradients).float()
        plain.step()
        adam.step()
        torch.testing.assert_close(weights, expected, rtol=1e-6, atol=2e-7)


@pytest.mark.parametrize("kind", ADAMS)
@pytest.mark.parametrize("size", [1, 2, 4])
def test_shared_directions_with_exact_averages_are_what_the_papers_say(size: int, kind: str) -> None:
    world = worlds("none", kind, size)
    oracle = Shared(kind, world.bucket.numel)
    for step in range(14):
        gradients = world.gradients(step)
        for gradient in gradients:
            gradient[:70] = 0  # never anything
            gradient[70:90] *= step == 6  # after a variance is frozen, and in a dense step of 0/1 Adam
        results = world.step(gradients)
        torch.testing.assert_close(results[0].double(), oracle(gradients), rtol=1e-4, atol=1e-5)
        assert not results[0][:70].any()
        assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize(
    ("keys", "dense"),
    [
        ({"refresh": 4, "var_freeze_step": 9}, [0, 4, 8]),
        ({"var_update_scaler": 2, "var_freeze_step": 15}, [0, 1, 2, 4, 6, 10, 14]),
    ],
)
def test_the_variance_is_measured_at_the_steps_that_the_paper_names(keys: dict[str, Any], dense: list[int]) -> None:
    direction = ZeroOneAdam(**keys)
    assert [at for at in range(40) if direction.interval(at)] == dense
    for rounds in range(40):
        assert direction.exact_rounds(rounds) == sum(at < rounds for at in dense)


# --- every scheme


@pytest.mark.parametrize("kind", EVERY)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_all_ranks_end_with_identical_bits_in_results_and_shared_moments(scheme: str, kind: str) -> None:
    world = worlds(scheme, kind, 3)
    for step in range(9):
        first, *others = world.step(world.gradients(step))
        assert first.isfinite().all() and all(torch.equal(first, other) for other in others)
        states = [moments(reducer) for reducer in world.reducers]
        assert all(states[0]), "every tensor has moments"
        if kind in SHARED:
            assert_same(states[0], states[1])
            assert_same(states[0], states[2])


@pytest.mark.parametrize("direction", LOCAL)
@pytest.mark.parametrize("scheme", WITH_MEMORY)
def test_what_was_sent_plus_what_is_remembered_are_the_local_directions(scheme: str, direction: str) -> None:
    world = World(config(scheme, direction=direction, **UNFILTERED.get(scheme, {})), 4)
    oracle = Local(direction, 4, world.bucket.numel)
    came_in = torch.zeros(world.bucket.numel, dtype=torch.float64)
    sent = torch.zeros_like(came_in)
    for step in range(8):
        gradients = world.gradients(step)
        came_in += mean(oracle(gradients))
        sent += world.step(gradients)[0]
        torch.testing.assert_close(sent + world.memory(), came_in, rtol=0, atol=1e-4)
    assert world.memory().norm() > 0


@pytest.mark.parametrize("kind", ADAMS)
@pytest.mark.parametrize("scheme", WITH_MEMORY)
def test_what_was_sent_plus_what_is_remembered_is_what_was_formed_of_the_shared_moment(scheme: str, kind: str) -> None:
    """In each coded step beta1 m + (1 - beta1) g + r = m' + r'; a dense one leaves the memory alone."""
    world = worlds(scheme, kind, 3, **UNFILTERED.get(scheme, {}))
    for step in range(12):
        gradients, m, r = world.gradients(step), moment(world), world.memory()
        world.step(gradients)
        formed = 0.8 * m + (1 - 0.8) * mean(gradients)
        torch.testing.assert_close(moment(world) + world.memory(), formed + r, rtol=0, atol=1e-5)
    assert world.memory().norm() > 0


@pytest.mark.parametrize("kind", EVERY)
@pytest.mark.parametrize("scheme", SOME)
def test_moments_are_saved_and_continue_bit_for_bit(scheme: str, kind: str) -> None:
    first, second, resumed = (worlds(scheme, kind, 2) for _ in range(3))
    for step in range(5):
        for world in (first, second):
            world.step(world.gradients(step))
    for old, new in zip(second.reducers, resumed.reducers):
        file = io.BytesIO()
        torch.save(old.state_dict(), file)
        file.seek(0)
        new.load_state_dict(torch.load(file, weights_only=True))
    for step in range(5, 11):
        expected = first.step(first.gradients(step))
        assert all(map(torch.equal, resumed.step(resumed.gradients(step)), expected))


@pytest.mark.parametrize("kind", EVERY)
@pytest.mark.parametrize("scheme", SOME)
def test_a_skipped_step_leaves_no_trace_in_the_moments(scheme: str, kind: str) -> None:
    straight, skipping = (worlds(scheme, kind, 2) for _ in range(2))
    for step in range(7):
        overflow = [torch.full_like(g, torch.inf) if step % 3 == 2 else g * 1e3 for g in skipping.gradients(99)]
        skipping.step(overflow, skipped=True)
        expected = straight.step(straight.gradients(step))
        assert all(map(torch.equal, skipping.step(skipping.gradients(step)), expected))
        for a, b in zip(straight.reducers, skipping.reducers):
            assert_same(moments(a), moments(b))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("direction", LOCAL)
def test_a_gradient_that_is_not_finite_leaves_the_local_moments_of_its_rank_as_they_were(
    direction: str, bad: float
) -> None:
    world = World(config("none", direction=direction), 2)
    oracle = Local(direction, 2, world.bucket.numel)
    for step in range(6):
        gradients, before = world.gradients(step), moments(world.reducers[1])
        if step in (0, 3):
            gradients[1][17] = bad
            oracle(gradients, skip=1)
            assert all(result.isnan().any() for result in world.step(gradients))
            assert all(map(torch.equal, values(moments(world.reducers[1])), values(before)))
        else:
            torch.testing.assert_close(world.step(gradients)[0].double(), mean(oracle(gradients)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("kind", SHARED)
@pytest.mark.parametrize("scheme", [name for name in SCHEMES if registry.get(name).trains])
def test_a_gradient_that_is_not_finite_on_one_rank_leaves_shared_moments_and_residuals_of_all_as_they_were(
    scheme: str, kind: str, bad: float
) -> None:
    """Although no step was skipped; in the dense steps and in the coded ones."""
    world = worlds(scheme, kind, 3)
    for step in range(10):
        gradients = world.gradients(step)
        before = [r.state_dict() for r in world.reducers]
        if step in (0, 2, 4, 7):
            gradients[1][17] = bad
            assert all(result.isnan().all() for result in world.step(gradients))
            for reducer, kept in zip(world.reducers, before):
                now = reducer.state_dict()
                for part in (moments_of, residual_of):
                    assert len(values(part(now))) == len(values(part(kept)))
                    assert all(map(torch.equal, values(part(now)), values(part(kept))))
        else:
            assert all(result.isfinite().all() for result in world.step(gradients))


@pytest.mark.parametrize("kind", EVERY)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_what_is_zero_on_every_rank_at_every_step_stays_zero(scheme: str, kind: str) -> None:
    """Rows, which signs are told of by marks, and single elements, which have no variance."""
    world = worlds(scheme, kind, 3)
    width = world.bucket.segments[0].row
    row, alone = slice(width, 3 * width), torch.arange(700, 1200, 7)
    moved = False
    for step in range(10):
        gradients = world.gradients(step)
        for gradient in gradients:
            gradient[row] = 0
            gradient[alone] = 0
        results = world.step(gradients)
        moved |= bool(results[0].any())
        assert not results[0][row].any() and not world.memory()[row].any()
        if kind in SHARED:
            assert not results[0][alone].any()
            assert results[0].abs().max() < 1e4 or scheme in NOISY
            for slot in ("shared_m", "shared_v"):
                assert not world.reducers[0].state.kept(world.bucket, slot)[alone].any()
    assert moved


@pytest.mark.parametrize("kind", ADAMS)
def test_a_rank_without_a_gradient_sends_its_share_of_the_shared_moment(kind: str) -> None:
    absence, zeros = (worlds("topk", kind, 3, ratio=1.0) for _ in range(2))
    oracle = Shared(kind, absence.bucket.numel)
    name = absence.bucket.segments[0].name
    numel = absence.bucket.segments[0].numel
    for step in range(9):
        gradients = absence.gradients(step)
        gradients[step % 3][:numel] = 0
        absent = [frozenset({name}) if rank == step % 3 else frozenset() for rank in range(3)]
        expected, results = oracle(gradients), absence.reduce(gradients, absent=absent)
        for reducer in absence.reducers:
            reducer.end_step()
        torch.testing.assert_close(results[0].double(), expected, rtol=1e-3, atol=1e-4)
        assert torch.equal(results[0], zeros.step(gradients)[0])


@pytest.mark.parametrize("direction", LOCAL)
@pytest.mark.parametrize("scheme", ["none", "ef_signsgd", "marsit"])
def test_a_rank_without_a_gradient_keeps_its_local_moments_and_sends_nothing(scheme: str, direction: str) -> None:
    world = World(config(scheme, direction=direction), 2)
    idle, parts = world.bucket.segments[0], [segment.numel for segment in world.bucket.segments]
    oracles = [Local(direction, 2, numel) for numel in parts]
    for step in range(6):
        gradients, before = world.gradients(step), moments(world.reducers[1])
        pieces = [gradient.split(parts) for gradient in gradients]
        lacks = step in (2, 3)
        if lacks:
            pieces[1][0].zero_()
        results = world.reduce(gradients, absent=[[], [idle.name] if lacks else []])
        for reducer in world.reducers:
            reducer.end_step()
        found = [oracles[0]([g[0] for g in pieces], skip=1 if lacks else None), oracles[1]([g[1] for g in pieces])]
        expected = torch.cat([found[0][0] if lacks else sum(found[0]), sum(found[1])]).double() / 2
        if scheme == "none":
            torch.testing.assert_close(results[0].double(), expected, rtol=1e-5, atol=1e-5)
        for slot, named in before.items() if lacks else ():
            assert_same(moments(world.reducers[1])[slot][idle.name], named[idle.name])


@pytest.mark.parametrize("direction", LOCAL)
@pytest.mark.parametrize("scheme", ["none", "ef_signsgd"])
def test_a_rank_that_owns_a_shard_gets_the_average_of_local_directions_there(scheme: str, direction: str) -> None:
    whole, sharded = (World(config(scheme, direction=direction), 2) for _ in range(2))
    shards = [1000, whole.bucket.numel - 1000]
    for step in range(4):
        gradients = whole.gradients(step)
        expected, results = whole.step(gradients), sharded.reduce(gradients, shards)
        for rank, reducer in enumerate(sharded.reducers):
            reducer.end_step()
            mine = results[rank].split(shards)[rank]
            if scheme == "none":
                torch.testing.assert_close(mine, expected[rank].split(shards)[rank], rtol=1e-6, atol=1e-6)
            for a, b in zip(values(moments(reducer)), values(moments(whole.reducers[rank]))):
                assert torch.equal(a, b)


@pytest.mark.parametrize("kind", [*LOCAL, *ADAMS])
def test_exempt_tensors_and_warm_up_steps_get_directions_too(kind: str) -> None:
    """The script's optimizer is plain SGD: a raw gradient would be the wrong step for it."""
    cfg = config("ef_signsgd", **{"warmup_steps": 2, **SETTINGS[kind]})
    plan = make_plan(cfg, [TensorSpec("weight", (6, 7), "float32"), TensorSpec("bias", (6,), "float32")])
    matrix, bias = sorted(plan.buckets, key=lambda bucket: -bucket.numel)
    assert (matrix.scheme.name, bias.scheme.name) == ("ef_signsgd", "none")
    reducers = [Reducer(cfg, transport) for transport in LocalWorld(2).transports]
    assert not any(reducers[0].as_is(bucket) for bucket in plan.buckets)
    local = {
        bucket: Local(kind, 2, bucket.numel) if kind in LOCAL else Shared(kind, bucket.numel) for bucket in plan.buckets
    }
    generator = torch.Generator().manual_seed(0)
    for step in range(6):
        for bucket in plan.buckets:
            gradients = [torch.randn(bucket.numel, generator=generator) for _ in range(2)]
            jobs = [reducer.start(bucket, g.clone()) for reducer, g in zip(reducers, gradients)]
            drive(jobs)
            found = local[bucket](gradients)
            expected = mean(found) if isinstance(found, list) else found
            if bucket is bias or step < cfg.warmup_steps:
                torch.testing.assert_close(jobs[0].result().double(), expected, rtol=1e-4, atol=1e-5)
        for reducer in reducers:
            reducer.end_step()


@pytest.mark.parametrize("kind", ["momentum", "frozen_adam"])
def test_on_another_number_of_ranks_every_rank_starts_from_the_mean_of_the_moments(kind: str) -> None:
    keys = {**SETTINGS[kind], "warmup_steps": 2 if kind in SHARED else 0}
    old, whole = (World(config("none", **keys), size) for size in (3, 1))
    for step in range(4):
        gradients = old.gradients(step)
        old.step(gradients)
        whole.step([mean(gradients).float()])
    state = reshard([r.state_dict() for r in old.reducers])
    new = World(config("none", **keys), 2)
    for reducer in new.reducers:
        reducer.load_state_dict(state)
    gradients = new.gradients(9)
    torch.testing.assert_close(new.step(gradients)[0], whole.step([mean(gradients).float()])[0], rtol=1e-4, atol=1e-4)


def test_a_scheme_counts_its_own_rounds_not_the_dense_ones_of_a_direction() -> None:
    """Marsit's first round is a flush, without which it has no scales; here the first step is dense by itself."""
    world = World(config("marsit", direction={"kind": "zero_one_adam", "refresh": 5}, flush_steps=100), 2)
    for step in range(5):
        world.step(world.gradients(step))
        m = world.reducers[0].state.kept(world.bucket, "shared_m")
        sizes = len(m.abs().unique())
        assert sizes > 100 if step in (0, 1) else sizes <= 2


# --- does it train


@pytest.mark.parametrize("scheme", ["ef_signsgd", "qsgd", "topk"])
def test_a_frozen_variance_trains_as_adam_does_where_the_scales_of_gradients_differ(scheme: str) -> None:
    """Least squares whose columns differ a hundredfold: plain SGD with the same average would stand still."""
    generator = torch.Generator().manual_seed(0)
    scales = torch.logspace(-1, 1, 64)
    data = [torch.randn(512, 64, generator=generator) * scales for _ in range(2)]
    truth = torch.randn(64, 1, generator=generator) / scales[:, None]

    def final(cfg: Config) -> float:
        world = World(cfg, 2, {"w": (64, 1)})
        w = torch.zeros(64, 1)
        draw = torch.Generator().manual_seed(1)
        for step in range(400):
            rows = [torch.randint(512, (32,), generator=draw) for _ in data]
            batches = [part[i] for part, i in zip(data, rows)]
            gradients = [(b.T @ (b @ (w - truth)) / 32).view(-1) for b in batches]
            w -= 0.05 * (1 - step / 400) * world.step(gradients)[0].view(64, 1)
        return float(torch.cat([d @ (w - truth) for d in data]).square().mean())

    start = float(torch.cat([d @ truth for d in data]).square().mean())
    keys = {"ef_signsgd": {"block": 32}, "topk": {"ratio": 4.0}, "qsgd": {"block": 32}}[scheme]
    frozen = {"direction": {"kind": "frozen_adam"}, "warmup_steps": 60}
    adam, coded = final(config("none", direction="adam")), final(config(scheme, **keys, **frozen))
    assert adam < 0.05 * start and coded < 0.1 * start
