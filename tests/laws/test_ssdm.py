"""Stochastic signs: unbiased in one exchange and hop by hop, and what the hops cost."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ..world import World, config, mean

SMALL = {"w": (2, 4)}  # short, so that the noise of a draw, sqrt(8) of the gradient, leaves something to see


def draws(scheme: str, size: int, count: int, shards: list[int] | None = None) -> tuple[Tensor, Tensor]:
    """(Mean gradient, its `count` random averages), float64."""
    world = World(config(scheme), size, SMALL)
    gradients = world.gradients(7)
    found = []
    for _ in range(count):
        results = world.reduce(gradients, shards)
        for reducer in world.reducers:
            reducer.end_step()
        found.append(torch.cat([r.split(shards)[i] for i, r in enumerate(results)]) if shards else results[0])
    return mean(gradients), torch.stack(found).double()


@pytest.mark.parametrize(
    ("scheme", "size", "shards"),
    [
        ("ssdm", 1, None),
        ("ssdm", 3, None),
        ("ssdm", 2, [5, 3]),
        ("ssdm", 2, [2, 6]),
        ("cascading_ssdm", 1, None),
        ("cascading_ssdm", 2, None),
    ],
)
def test_the_mean_of_many_draws_is_the_mean_gradient(scheme: str, size: int, shards: list[int] | None) -> None:
    expected, found = draws(scheme, size, 1200, shards)
    sigma = found.std(0) / len(found) ** 0.5
    z = (found.mean(0) - expected) / sigma
    assert z.abs().max() < 4.5 and z.square().mean() < 3
    # What the test could see: without its sign, or with half of it, the gradient would be sigmas away everywhere.
    assert (expected / sigma).square().mean() > 3**2
    along = found @ expected / expected.square().sum()
    assert along.mean() == pytest.approx(1, abs=4.5 * float(along.std()) / len(found) ** 0.5)
    assert along.std() / len(found) ** 0.5 < 0.1


def test_one_message_has_the_length_and_variance_of_the_contract() -> None:
    """||decoded||^2 = d ||g||^2 in every draw, hence E||decoded - g||^2 = (d - 1) ||g||^2."""
    expected, found = draws("ssdm", 1, 1000)
    norm = expected.square().sum()
    torch.testing.assert_close(found.square().sum(1), (8 * norm).expand(1000), rtol=1e-5, atol=0)
    assert (found - expected).square().sum(1).mean() == pytest.approx(7 * float(norm), rel=0.05)


@pytest.mark.parametrize("size", [2, 3, 4])
def test_every_hop_multiplies_the_error_of_the_cascade(size: int) -> None:
    """Equal gradients g on all ranks and segments of d / n elements: the second moment after h hops is
    A_h = (d / n) (A_(h-1) + (2 h + 1) ||g||^2), A_0 = (d / n) ||g||^2.
    """
    world = World(config("cascading_ssdm"), size, {"w": (size, 512)})
    gradient = torch.randn(512, generator=torch.Generator().manual_seed(0)).repeat(size)
    norm = float(gradient.double().square().sum())
    expected = 512 * norm
    for hop in range(1, size):
        expected = 512 * (expected + (2 * hop + 1) * norm)
    found = torch.stack([world.step([gradient] * size)[0] for _ in range(40)]).double()
    assert (size * found).square().sum(1).mean() == pytest.approx(expected, rel=0.05)


def test_more_ranks_make_ssdm_better_and_the_cascade_worse() -> None:
    def error(scheme: str, size: int) -> float:
        world = World(config(scheme), size)
        gradients = [torch.ones(world.bucket.numel)] * size
        return float((world.step(gradients)[0] - 1).norm() / world.bucket.numel**0.5)

    gathered, cascading = ([error(scheme, n) for n in (2, 4, 8)] for scheme in ("ssdm", "cascading_ssdm"))
    assert gathered == sorted(gathered, reverse=True)
    assert cascading[0] > 10 * gathered[0] and cascading[1] > 100 * cascading[0] and cascading[2] > 1000 * cascading[1]


def test_a_norm_beyond_fp32_stays_at_its_end() -> None:
    """22.6^8 times the gradient's norm after eight hops."""
    world = World(config("cascading_ssdm"), 8, {"w": (8, 512)})
    results = world.step([torch.full((world.bucket.numel,), 1e30)] * 8)
    assert all(torch.equal(r, results[0]) for r in results)
    torch.testing.assert_close(results[0].abs() * 8, torch.full_like(results[0], 3.4028e38), rtol=1e-4, atol=0)


@pytest.mark.parametrize(("size", "words"), [(2, 25), (3, 17), (4, 13), (7, 8)])
def test_wire_of_the_cascade_is_two_rounds_of_the_longest_segment(size: int, words: int) -> None:
    """1600 elements: 50 words of signs in segments of whole words, each with a norm."""
    world = World(config("cascading_ssdm"), size, {"w": (40, 40)})
    world.step(world.gradients(0))
    marks = (size - 1) * 4 * 2  # a bit for each of 40 rows
    sent = 2 * (size - 1) * 4 * (words + 1) + marks
    for transport in world.local.transports:
        assert transport.sent == sent
    assert 8 * world.bucket.wire_bytes(size) == 8 * sent


@pytest.mark.parametrize("size", [2, 3, 8])
def test_wire_of_ssdm_is_a_bit_an_element_and_a_norm_to_every_other_rank(size: int) -> None:
    world = World(config("ssdm"), size, {"w": (40, 40)})
    world.step(world.gradients(0))
    assert all(8 * transport.sent == (size - 1) * (1600 + 32 + 64) for transport in world.local.transports)
