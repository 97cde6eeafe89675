"""1-bit LAMB as a direction, against the papers' formulas in fp64."""

from __future__ import annotations

import pytest
import torch

from compression_plugins.engine.session import Session
from compression_plugins.errors import ConfigError, UnsupportedError
from compression_plugins.transports.local import LocalWorld, drive

from ..world import SHAPES, World, config, mean

B1, B2, WARM = 0.8, 0.9, 4


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("size", [1, 3])
def test_with_exact_averages_it_is_lamb_then_one_bit_lamb(size: int, decay: float) -> None:
    direction = {"kind": "frozen_lamb", "betas": [B1, B2], "weight_decay": decay, "max_coeff": 0.6}
    world = World(config("none", direction=direction, warmup_steps=WARM), size)
    names = [segment.name for segment in world.bucket.segments]
    w = {name: world.weights[name].double().flatten() for name in names}
    m, v, fresh = ({name: torch.zeros_like(w[name]) for name in names} for _ in range(3))
    kept, last = dict.fromkeys(names, 0.0), dict.fromkeys(names, 1.0)
    ratios = []
    for step in range(1, 12):
        gradients = world.gradients(step)
        result = world.step(gradients)[0]
        averages = dict(zip(names, mean(gradients).split([w[name].numel() for name in names])))
        moved = dict(zip(names, result.split([w[name].numel() for name in names])))
        for name, g in averages.items():
            m[name] = B1 * m[name] + (1 - B1) * g
            warm = step <= WARM
            fresh[name] = B2 * (v if warm else fresh)[name] + (1 - B2) * g * g
            v[name] = fresh[name] if warm else v[name]
            bias = 1 - B2 ** min(step, WARM)
            root = (v[name] / bias).sqrt() + 1e-8
            adam = m[name] / (1 - B1**step if warm else 1) / root
            update = adam + decay * w[name]
            if warm:
                ratio = float((w[name].norm() / update.norm()).clamp(0.01, 0.6))
                kept[name] = 0.9 * kept[name] + 0.1 * ratio
            else:
                factor = float((root / ((fresh[name] / bias).sqrt() + 1e-8)).max())
                if decay:
                    share = min(1.0, float(adam.norm() / update.norm()))
                    factor = factor * share + 1 - share
                last[name] = min(max(min(max(factor, 0.5), 4.0), 0.9 * last[name]), 1.1 * last[name])
                ratio = kept[name] * last[name]
            ratios.append(ratio)
            torch.testing.assert_close(moved[name].double(), ratio * update, rtol=1e-4, atol=1e-5)
            w[name] = w[name] - 0.01 * ratio * update
            world.weights[name].copy_(w[name].view(SHAPES[name]))
    assert len({round(ratio, 3) for ratio in ratios}) > 4


def test_tensors_that_share_a_scale_keep_their_own_size() -> None:
    """Gradients of one are 1,000 times those of the other, and one scale of the code covers both."""
    sizes = {}
    for kind in ("frozen_lamb", "frozen_adam"):
        own = {"direction": {"kind": kind, "betas": [B1, B2]}, "warmup_steps": WARM, "block": 4096}
        world = World(config("ef_signsgd", **own), 2)
        small, large = (segment.numel for segment in world.bucket.segments)
        for step in range(WARM + 1):
            gradients = world.gradients(step)
            for gradient in gradients:
                gradient[:small] *= 1e-3
            world.step(gradients)
        m = world.reducers[0].state.kept(world.bucket, "shared_m").abs()
        sizes[kind] = float(m[:small].mean() / m[small:].mean())
        assert large
    assert 0.5e-3 < sizes["frozen_lamb"] < 2e-3
    assert sizes["frozen_adam"] > 0.1


def test_where_the_weights_are_not_shown_it_is_refused() -> None:
    world = World(config("none", direction="frozen_lamb", warmup_steps=2), 1)
    world.reducers[0].parameters = {}
    with pytest.raises(UnsupportedError, match="needs the weights of whole tensors.*frozen_adam"):
        world.step(world.gradients(0))


@pytest.mark.parametrize("keys", [{"min_coeff": 11.0}, {"factor_max": 0.4}])
def test_bounds_that_cross_are_refused(keys: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match="is above"):
        config("none", direction={"kind": "frozen_lamb", **keys}, warmup_steps=2)


def test_a_session_shows_the_weights_of_its_parameters() -> None:
    p = torch.nn.Parameter(torch.full((40, 30), 2.0))
    session = Session("Host", config("ef_signsgd", direction="frozen_lamb", warmup_steps=2), {"w": p}, speaks=False)
    session.start(LocalWorld(1).transports[0])
    (bucket,) = session.plan.buckets
    one = session.reducer.reduce(bucket, torch.ones(1200))
    torch.testing.assert_close(one, torch.full((1200,), 2.0), rtol=1e-5, atol=0)  # ratio 2, step 1
    session.end_step()
    with torch.no_grad():
        p.fill_(0.5)
    torch.testing.assert_close(session.reducer.reduce(bucket, torch.ones(1200)), torch.full((1200,), 0.5))


def test_exempt_tensors_get_the_direction_exactly() -> None:
    world = World(config("ef_signsgd", direction="frozen_lamb", warmup_steps=2, exempt=["second.*"]), 2)
    plain = World(config("none", direction="frozen_lamb", warmup_steps=2), 2)
    (exempt,) = [bucket for bucket in world.plan.buckets if bucket.scheme.host_dense]
    numel = exempt.numel
    for step in range(5):
        gradients = plain.gradients(step)
        jobs = [r.start(exempt, g[:numel].clone()) for r, g in zip(world.reducers, gradients)]
        drive(jobs)
        expected = plain.step(gradients)[0][:numel]
        for reducer in world.reducers:
            reducer.end_step()
        torch.testing.assert_close(jobs[0].result(), expected, rtol=1e-5, atol=1e-6)
