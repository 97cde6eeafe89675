"""Laws 2, 3, 4, 6: every registered scheme, on 1 to 4 ranks in one process."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from compression_plugins.codecs import Codec, Sign, Uniform
from compression_plugins.core.memory import Memory
from compression_plugins.schemes import registry
from compression_plugins.schemes.base import Scheme

from ..world import World, config, mean

SCHEMES = registry.names()
WITH_MEMORY = [name for name in SCHEMES if config(name).scheme.memory]
UNBIASED = ["qsgd", "double_quantization", "ssdm", "cascading_ssdm"]
#: Unbiased, but with a variance of the bucket's length and more: a single draw says nothing, and the laws that such a
#: scheme can fail are those of tests/laws/test_ssdm.py.
NOISY = ["ssdm", "cascading_ssdm"]


def variants(name: str) -> list[dict]:
    """Every value of every option with a short list of choices, so that no branch of a scheme goes untested."""
    choices: list[dict] = [{}]
    for key, field in registry.get(name).model_json_schema()["properties"].items():
        options = field.get("enum") or [f["const"] for f in field.get("anyOf", []) if "const" in f]
        choices += [{key: option} for option in options]
    return choices


#: What only measures time loses most of the gradient, whatever that holds.
IDLE = [name for name in SCHEMES if not registry.get(name).trains]
CASES = [
    pytest.param(name, v, id=f"{name}-{'-'.join(map(str, v.values()))}") for name in SCHEMES for v in variants(name)
]


@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize(("name", "variant"), CASES)
def test_all_ranks_end_with_identical_bits(name: str, variant: dict, size: int) -> None:
    world = World(config(name, **variant), size)
    for step in range(4):
        first, *others = world.step(world.gradients(step))
        assert all(torch.equal(first, other) for other in others)
        assert first.isfinite().all()


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize(("name", "variant"), [c for c in CASES if c.values[0] in WITH_MEMORY])
def test_what_was_sent_plus_what_is_remembered_is_what_came_in(name: str, variant: dict, size: int) -> None:
    conserve(World(config(name, **variant), size))


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize(
    "law", [Memory(decay=0.9), Memory(alpha=0.9, decay=0.9), Memory(alpha=0.5, decay=0.9, sent=0.5)], ids=str
)
@pytest.mark.parametrize("codec", [Sign(64), Uniform(2, 64)], ids=lambda codec: type(codec).__name__)
def test_what_was_sent_and_what_is_remembered_are_what_came_in_less_what_decayed(
    codec: Codec, law: Memory, size: int
) -> None:
    """No scheme of this house lets memory decay, so toys do."""
    world = World(config("topk"), size)
    parts = {"codec": property(lambda self: codec), "memory": property(lambda self: law), "mean": Scheme.mean}
    toy = type("Toy", (type(world.bucket.scheme),), {**parts, "__module__": __name__})()
    object.__setattr__(world.plan.buckets[0], "scheme", toy)
    conserve(world)


def conserve(world: World) -> None:
    """Applied + remembered = came in - decayed, at every step."""
    law = world.bucket.scheme.memory
    owed = torch.zeros(world.bucket.numel, dtype=torch.float64)
    sent = torch.zeros_like(owed)
    for step in range(8):
        gradients = world.gradients(step)
        owed += mean(gradients) - (1 - law.decay) * world.memory()
        sent += law.sent * world.step(gradients)[0].double()
        torch.testing.assert_close(sent + world.memory(), owed, rtol=0, atol=2e-5)
    assert world.memory().norm() > 0, "else nothing was left to remember"


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize(("name", "variant"), CASES)
def test_wire_bits_say_what_the_transport_counts(name: str, variant: dict, size: int) -> None:
    world = World(config(name, **variant), size)
    steps = 3  # one period of the short setting
    for step in range(steps):
        world.step(world.gradients(step))
    counted = sum(t.sent for t in world.local.transports) * 8 / size / steps
    assert counted == pytest.approx(8 * world.bucket.wire_bytes(size), rel=1e-9)


@pytest.mark.parametrize("name", UNBIASED)
def test_unbiased_schemes_average_to_the_mean(name: str) -> None:
    world, trials = World(config(name), 2), 400
    gradients = world.gradients(0)
    draws = torch.stack([world.step(gradients)[0] for _ in range(trials)]).double()
    random = draws.std(0) > 1e-5  # a block's largest value is a level itself and is not rounded
    z = ((draws.mean(0) - mean(gradients)) / (draws.std(0) / math.sqrt(trials)))[random]
    # Under the law z is standard normal: its mean square is 1 +- 0.03 over 3000 values, and 6 is a one in 1e5 event.
    assert random.sum() > 2000
    assert z.square().mean() == pytest.approx(1, abs=0.2)
    assert z.abs().max() < 6


@pytest.mark.parametrize("name", [name for name in WITH_MEMORY if name != "marsit"])
def test_one_step_comes_nearer_to_the_mean_than_no_step_at_all(name: str) -> None:
    """Contraction. (Signs of aggregated updates of fixed size are none: Marsit has laws of its own.)"""
    world = World(config(name), 2)
    gradients = [world.gradients(0)[0]] * 2
    error = (world.step(gradients)[0] - mean(gradients)).norm()
    assert error < 0.99 * mean(gradients).norm()


@pytest.mark.parametrize("shape", [(0, 3), (1, 1), (1, 2), (3, 11), (31, 33), (1, 1025)])
@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize(("name", "variant"), CASES)
def test_odd_lengths_and_empty_tensors(name: str, variant: dict, size: int, shape: tuple[int, int]) -> None:
    rules = [{"match": "only", "scheme": name}]  # a rule compresses what would else be exempt for its size
    world = World(config(name, rules=rules, **variant), size, {"only": shape})
    for step in range(2):
        results = world.step(world.gradients(step))
        assert all(r.shape == (shape[0] * shape[1],) and torch.equal(r, results[0]) for r in results)


@pytest.mark.parametrize("value", [0.0, 1e-42, 1e-30, 1e30])
@pytest.mark.parametrize("name", SCHEMES)
def test_zeros_and_extreme_sizes_stay_finite(name: str, value: float) -> None:
    if name == "fp16" and value > 65504:
        pytest.skip("beyond half precision: the result is infinite, as documented by the format")
    world = World(config(name), 2)
    for step in range(4):
        results = world.step([g.sign() * value for g in world.gradients(step)])
        assert results[0].isfinite().all()
        if value == 0 and name != "signsgd":
            assert not results[0].any()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("guilty", [0, 1])
@pytest.mark.parametrize(("name", "variant"), [c for c in CASES if c.values[0] not in IDLE])
def test_a_gradient_that_is_not_finite_shows_on_every_rank_and_poisons_no_memory(
    name: str, variant: dict, guilty: int, bad: float
) -> None:
    world = World(config(name, **variant), 2)
    for step in range(5):
        gradients = world.gradients(step)
        if step in (1, 3):
            gradients[guilty][world.bucket.numel // 2] = bad
        results = world.step(gradients)
        healthy = [bool(r.isfinite().all()) for r in results]
        assert healthy == [step not in (1, 3)] * 2
        for reducer in world.reducers:
            assert not reducer.config.scheme.memory or reducer.state.kept(world.bucket).isfinite().all()


def scatters(case: Any) -> bool:
    return "scatter_mean" in config(case.values[0], **case.values[1]).scheme.operations


@pytest.mark.parametrize("shards", [[3080, 0], [1, 3079], [1500, 1580]])
@pytest.mark.parametrize(("name", "variant"), [c for c in CASES if c.values[0] not in NOISY + IDLE and scatters(c)])
def test_reduce_scatter_gives_each_rank_its_shard_of_an_average(name: str, variant: dict, shards: list[int]) -> None:
    world = World(config(name, **variant), 2)
    gradients = world.gradients(0)
    parts = [r.split(shards)[rank] for rank, r in enumerate(world.reduce(gradients, shards))]
    for reducer in world.reducers:
        reducer.end_step()
    if world.bucket.scheme.memory:
        torch.testing.assert_close(torch.cat(parts) + world.memory(), mean(gradients), rtol=0, atol=1e-5)
    elif name != "signsgd":
        error = (torch.cat(parts) - mean(gradients)).norm() / mean(gradients).norm()
        assert error < (1.5 if name in UNBIASED else 0.05)
    else:
        votes = sum(torch.where(g >= 0, 1, -1) for g in gradients)
        assert torch.equal(torch.cat(parts), torch.where(votes >= 0, 1.0, -1.0))
