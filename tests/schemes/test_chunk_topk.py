"""What chunk-wise top-k promises beyond the laws of every scheme: SparseLoCo's memory, its code, and its bits."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from compression_plugins.codecs import TwoMagnitudes, Uniform
from compression_plugins.core.call import Segment
from compression_plugins.schemes.chunk_topk import ChunkTopK
from compression_plugins.triton_kernels import Key

from ..world import World, config, mean

KEY = Key(seed=1, tensor=2, step=3, rank=0)


def oracle(x: np.ndarray, block: int) -> np.ndarray:
    """Two magnitudes in NumPy and float64, block by block."""
    out = []
    for start in range(0, len(x), block):
        part = x[start : start + block].astype(np.float64)
        size = np.abs(part)
        high = size > size.mean()
        low_mean = size[~high].mean()
        high_mean = size[high].mean() if high.any() else 0.0
        out.append(np.where(part >= 0, 1, -1) * np.where(high, high_mean, low_mean))
    return np.concatenate(out) if out else np.zeros(0)


@settings(deadline=None, max_examples=60)
@given(numel=st.integers(0, 700), block=st.sampled_from([32, 64, 512]), seed=st.integers(0, 999), zeros=st.booleans())
def test_two_bits_are_a_sign_and_one_of_two_means_whatever_the_length(
    numel: int, block: int, seed: int, zeros: bool
) -> None:
    codec = TwoMagnitudes(block)
    x = torch.randn(numel, generator=torch.Generator().manual_seed(seed))
    if zeros:
        x[::2] = 0
    payload = codec.encode(x, KEY)
    assert payload.dtype == torch.uint8 and len(payload) == codec.nbytes(numel)
    assert len(payload) == 8 * math.ceil(numel / block) + 4 * math.ceil(2 * numel / 32)
    decoded = codec.decode(payload, numel)
    np.testing.assert_allclose(decoded.numpy(), oracle(x.numpy(), block), rtol=1e-6, atol=0)
    total = torch.ones(numel)
    assert codec.decode(payload, numel, out=total, weight=-0.5, accumulate=True) is total
    torch.testing.assert_close(total, 1 - 0.5 * decoded)


@given(codes=st.lists(st.integers(0, 3), max_size=70))
def test_codes_lie_in_the_payload_two_bits_each_from_the_lowest_on(codes: list[int]) -> None:
    """A payload made by hand: magnitudes 3 and 5 in every block of 32."""
    blocks, words = -(-len(codes) // 32), -(-2 * len(codes) // 32)
    packed = sum(code << 2 * place for place, code in enumerate(codes)).to_bytes(4 * words, "little")
    payload = np.tile(np.float32([3, 5]), blocks).tobytes() + packed
    tensor = torch.tensor(list(payload), dtype=torch.uint8)
    assert TwoMagnitudes(32).decode(tensor, len(codes)).tolist() == [(-3, 3, -5, 5)[code] for code in codes]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_block_that_is_not_finite_is_nan_and_others_are_not(bad: float) -> None:
    codec, x = TwoMagnitudes(32), torch.ones(96)
    x[40] = bad
    decoded = codec.decode(codec.encode(x, KEY), 96)
    assert decoded[32:64].isnan().all() and decoded[:32].eq(1).all() and decoded[64:].eq(1).all()


def test_two_magnitudes_lose_a_tenth_of_what_three_levels_lose_of_the_largest_of_neighbours() -> None:
    rows = torch.randn(4096, 50, generator=torch.Generator().manual_seed(0))
    values = rows.gather(1, rows.abs().argmax(1, keepdim=True)).view(-1)
    lost = [
        float((values - c.decode(c.encode(values, KEY), 4096)).square().sum() / values.square().sum())
        for c in (TwoMagnitudes(512), Uniform(2, 512, rounding="nearest"))
    ]
    assert lost[0] < 0.02 and lost[1] > 10 * lost[0]


def largest_of_chunks(m: Tensor, ratio: int) -> Tensor:
    """Places, in float64 and one by one."""
    return torch.tensor([s + int(part.abs().argmax()) for s, part in zip(range(0, len(m), ratio), m.split(ratio))])


@pytest.mark.parametrize("decay", [1.0, 0.95])
@pytest.mark.parametrize("values", ["2bit", "4bit", "8bit", "bf16"])
def test_ranks_follow_the_memory_of_sparse_loco(values: str, decay: float) -> None:
    """m <- decay m + g, then m <- m - q, in float64 beside the scheme; only the code of the values is the scheme's."""
    world = World(config("chunk_topk", ratio=7, values=values, decay=decay), 3)
    codec = world.bucket.scheme._format()
    memories = [torch.zeros(world.bucket.numel, dtype=torch.float64) for _ in range(3)]
    for step in range(5):
        gradients = world.gradients(step)
        sent = []
        for rank, gradient in enumerate(gradients):
            memories[rank] = decay * memories[rank] + gradient
            places = largest_of_chunks(memories[rank], 7)
            chosen = memories[rank][places].float()
            q = torch.zeros_like(memories[rank])
            q[places] = codec.decode(codec.encode(chosen, KEY), len(places)).double()
            memories[rank] -= q
            sent.append(q)
        torch.testing.assert_close(world.step(gradients)[0].double(), mean(sent), rtol=0, atol=1e-5)
        for m, reducer in zip(memories, world.reducers):
            torch.testing.assert_close(reducer.state.kept(world.bucket).double(), m, rtol=0, atol=1e-5)


@pytest.mark.parametrize("ratio", [2, 16, 50, 64, 1000])
def test_two_bits_and_a_place_are_sent_for_one_value_in_so_many(ratio: int) -> None:
    bits = ChunkTopK(ratio=ratio).wire_bits([Segment("w", 0, 1 << 20, (1024, 1024), 1024)], 2) / (1 << 20)
    ideal = (2 + math.ceil(math.log2(ratio))) / ratio
    assert ideal < bits < ideal + (0.13 + 0.1) / ratio + 1e-3  # two magnitudes for 512 values


def test_every_value_in_bf16_is_the_dense_average() -> None:
    world = World(config("chunk_topk", ratio=1, values="bf16"), 3)
    owed = torch.zeros(world.bucket.numel, dtype=torch.float64)
    for step in range(3):
        gradients = world.gradients(step)
        torch.testing.assert_close(world.step(gradients)[0].double(), mean(gradients) + owed, rtol=2**-7, atol=2**-7)
        owed = world.memory()


def test_a_chunk_that_is_not_finite_keeps_its_memory() -> None:
    world = World(config("chunk_topk", ratio=10), 2)
    world.step(world.gradients(0))
    before = [reducer.state.kept(world.bucket).clone() for reducer in world.reducers]
    gradients = world.gradients(1)
    gradients[1][25] = torch.nan
    assert all(result.isnan().any() for result in world.step(gradients))
    after = world.reducers[1].state.kept(world.bucket)
    assert torch.equal(after[20:30], before[1][20:30]) and after.isfinite().all()


def test_signs_are_those_of_the_mean_zero_where_nothing_came_and_nan_where_it_is_not_finite() -> None:
    plain, signed = (World(config("chunk_topk", ratio=4, decay=0.9, signs=signs), 3) for signs in (False, True))
    for step in range(3):
        gradients = plain.gradients(step)
        values, signs = plain.step(gradients)[0], signed.step(gradients)[0]
        assert torch.equal(signs, values.sign()) and 0 < int(signs.eq(0).sum()) < len(signs)
        for one, other in zip(plain.reducers, signed.reducers):
            assert torch.equal(one.state.kept(plain.bucket), other.state.kept(signed.bucket))
    gradients = plain.gradients(3)
    gradients[1][5] = math.nan
    assert torch.equal(signed.step(gradients)[0].isnan(), plain.step(gradients)[0].isnan())
