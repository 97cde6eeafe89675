"""What ScaleCom promises beyond the laws of every scheme: Algorithm 1, its leader, its bits, and lossless rounding."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import Tensor

from compression_plugins.engine.state import reshard
from compression_plugins.transports.base import Handle
from compression_plugins.transports.local import LocalTransport

from ..world import World, config, mean

FORMS = [dict(zip(("selection", "values"), form)) for form in product(["chunk", "exact"], ["fp32", "fp16", "bf16"])]


@pytest.fixture
def broadcasts(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """(root, bytes) of every broadcast that rank 0 takes part in."""
    seen: list[tuple[int, int]] = []
    plain = LocalTransport._broadcast

    def watch(self: LocalTransport, x: Tensor, root: int) -> Handle:
        if self.rank == 0:
            seen.append((root, x.numel() * x.element_size()))
        return plain(self, x, root)

    monkeypatch.setattr(LocalTransport, "_broadcast", watch)
    return seen


def run(world: World, *seeds: int, skipped: bool = False) -> None:
    for seed in seeds:
        world.step(world.gradients(seed), skipped)


# --- Algorithm 1


@pytest.mark.parametrize("beta", [0.1, 1.0])
def test_three_ranks_follow_algorithm_1_of_the_paper(beta: float) -> None:
    """The published recursion, in float64 and in its own variables: m <- (1 - beta) m + beta (m + g - sent)."""
    world = World(config("scalecom", ratio=10, beta=beta, selection="exact"), 3)
    memories = [torch.zeros(world.bucket.numel, dtype=torch.float64) for _ in range(3)]
    k = -(-world.bucket.numel // 10)
    for step in range(7):
        gradients = world.gradients(step)
        p = [m + g.double() for m, g in zip(memories, gradients)]
        chosen = p[step % 3].abs().topk(k).indices
        sent = [torch.zeros_like(each).index_copy_(0, chosen, each[chosen]) for each in p]
        memories = [(1 - beta) * m + beta * (each - s) for m, each, s in zip(memories, p, sent)]
        torch.testing.assert_close(world.step(gradients)[0].double(), mean(sent), rtol=0, atol=1e-5)
        for m, reducer in zip(memories, world.reducers):
            torch.testing.assert_close(beta * reducer.state.kept(world.bucket).double(), m, rtol=0, atol=1e-5)


@pytest.mark.parametrize("form", FORMS, ids=lambda form: "-".join(form.values()))
@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_what_was_sent_plus_what_is_remembered_is_what_came_in_in_every_form(size: int, form: dict[str, str]) -> None:
    world = World(config("scalecom", ratio=10, beta=0.3, **form), size)
    came_in = torch.zeros(world.bucket.numel, dtype=torch.float64)
    sent = torch.zeros_like(came_in)
    for step in range(20):
        gradients = world.gradients(step)
        came_in += mean(gradients)
        first, *others = world.step(gradients)
        assert all(torch.equal(first, other) for other in others)
        sent += first
    torch.testing.assert_close(sent + world.memory(), came_in, rtol=0, atol=3e-5)


def test_ties_are_broken_by_the_leader_alone() -> None:
    world = World(config("scalecom", ratio=10, selection="exact"), 3)
    for step in range(4):
        first, *others = world.step([g.sign() for g in world.gradients(step)])
        assert all(torch.equal(first, other) for other in others)
        assert first.count_nonzero() <= -(-world.bucket.numel // 10)


# --- the leader


def test_leader_is_the_round_modulo_the_ranks(broadcasts: list[tuple[int, int]]) -> None:
    run(World(config("scalecom"), 3), *range(7))
    assert [root for root, _ in broadcasts] == [0, 1, 2, 0, 1, 2, 0]


def test_leader_goes_on_after_a_resume_and_on_another_number_of_ranks(broadcasts: list[tuple[int, int]]) -> None:
    first = World(config("scalecom"), 3)
    run(first, 0, 1)
    states = [reducer.state_dict() for reducer in first.reducers]
    second, larger = World(config("scalecom"), 3), World(config("scalecom"), 5)
    for world, saved in ((second, states), (larger, [reshard(states)] * 5)):
        for reducer, state in zip(world.reducers, saved):
            reducer.load_state_dict(state)
    del broadcasts[:]
    run(second, 2, 3)
    run(larger, 2, 3)
    assert [root for root, _ in broadcasts] == [2, 0] + [2, 3]


def test_a_skipped_step_does_not_pass_the_lead_on(broadcasts: list[tuple[int, int]]) -> None:
    world = World(config("scalecom"), 3)
    run(world, 0)
    run(world, 1, 2, skipped=True)
    run(world, 3, 4)
    assert [root for root, _ in broadcasts] == [0, 1, 1, 1, 2]


def test_after_warm_up_the_first_rank_leads_and_memory_starts_empty(
    broadcasts: list[tuple[int, int]],
) -> None:
    world = World(config("scalecom", warmup_steps=5, ratio=10, beta=0.5), 3)
    run(world, *range(5))
    assert not broadcasts and not world.memory().any()
    gradients = world.gradients(5)
    result = world.step(gradients)[0]
    assert [root for root, _ in broadcasts] == [0]
    sent = result != 0
    for gradient, reducer in zip(gradients, world.reducers):
        expected = torch.where(sent, 0, gradient)  # what warm-up sent dense is owed by nobody
        torch.testing.assert_close(reducer.state.kept(world.bucket), expected, rtol=0, atol=1e-6)


# --- bits


@pytest.mark.parametrize(
    ("ratio", "bits"), [(2, 1), (3, 2), (64, 6), (65, 7), (100, 7), (112, 7), (1024, 10), (65536, 16)]
)
def test_an_index_takes_log2_of_the_chunk_in_bits(broadcasts: list[tuple[int, int]], ratio: int, bits: int) -> None:
    world = World(config("scalecom", ratio=ratio), 2)
    run(world, 0, 1)
    chunks = -(-world.bucket.numel // ratio)
    assert [nbytes for _, nbytes in broadcasts] == [4 * -(-chunks * bits // 32)] * 2, "whole 32-bit words, no header"


@pytest.mark.parametrize("form", FORMS, ids=lambda form: "-".join(form.values()))
@pytest.mark.parametrize("shape", [(1, 7), (40, 200), (97, 131)])
@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_wire_bits_are_the_transports_bytes_in_every_form(
    size: int, shape: tuple[int, int], form: dict[str, str]
) -> None:
    world = World(config("scalecom", ratio=8, rules=[{"match": "w"}], **form), size, {"w": shape})
    run(world, 0)
    counted = sum(transport.sent for transport in world.local.transports) * 8 / size
    assert counted == pytest.approx(8 * world.bucket.wire_bytes(size), rel=1e-9)


def test_half_precision_halves_the_values_whatever_the_number_of_ranks() -> None:
    segments = World(config("scalecom"), 1, {"w": (1024, 1024)}).bucket.segments
    for size in (2, 8, 64):
        whole, half = (config("scalecom", values=v).scheme.wire_bits(segments, size) for v in ("fp32", "bf16"))
        k, places = -(-(2**20) // 10), 4 * (size - 1) / size
        assert whole / k == pytest.approx(64 * (size - 1) / size + places, rel=1e-3)
        assert half / k == pytest.approx(32 * (size - 1) / size + places, rel=1e-3)


# --- values in 16 bits


@pytest.mark.parametrize(("values", "dtype"), [("fp16", torch.float16), ("bf16", torch.bfloat16)])
def test_half_values_are_rounded_by_each_rank_added_in_fp32_and_rounded_once_more(
    values: str, dtype: torch.dtype
) -> None:
    world = World(config("scalecom", ratio=10, values=values, selection="exact"), 4)
    gradients = world.gradients(0)
    result = world.step(gradients)[0]
    chosen = gradients[0].abs().topk(-(-world.bucket.numel // 10)).indices
    total = sum(g[chosen].to(dtype).float() for g in gradients)
    assert torch.equal(result[chosen], (total / 4).to(dtype).float())


def test_values_beyond_fp16_are_sent_as_its_largest_and_the_rest_follows() -> None:
    world = World(config("scalecom", ratio=1, beta=1.0, values="fp16"), 4)
    huge, nothing = (torch.full((world.bucket.numel,), value) for value in (150_000.0, 1e-30))
    sent = [world.step([g] * 4)[0][0].item() for g in (huge, nothing, nothing, nothing)]
    assert sent[:2] == [65504.0, 65504.0]
    assert sum(sent) == 150_000.0
    assert world.memory().abs().max() < 1e-6


def test_values_below_fp16_are_saved_up_until_they_can_be_sent() -> None:
    world = World(config("scalecom", ratio=1, beta=1.0, values="fp16"), 2)
    tiny, steps = 1e-9, 200
    assert torch.tensor(tiny).half() == 0
    sent = sum(world.step([torch.full((world.bucket.numel,), tiny)] * 2)[0].double() for _ in range(steps))
    smallest = 2.0**-24
    assert (sent - steps * tiny).abs().max() < smallest
    assert (sent > 2 * smallest).all()


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("form", FORMS, ids=lambda form: "-".join(form.values()))
@pytest.mark.parametrize("value", [0.0, 1e-42, 1e-30, 1e30])
def test_extreme_sizes_stay_finite_in_every_form(value: float, form: dict[str, str], size: int) -> None:
    world = World(config("scalecom", **form), size)
    for step in range(4):
        results = world.step([g.sign() * value for g in world.gradients(step)])
        assert results[0].isfinite().all() and world.memory().isfinite().all()
