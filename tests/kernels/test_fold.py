"""The mergeable one-bit payloads: Marsit's operator, its all-reduce form, and the memory around them."""

from __future__ import annotations

import math

import pytest
import torch

from compression_plugins import triton_kernels as K
from compression_plugins.errors import CompressionError
from compression_plugins.triton_kernels import philox
from compression_plugins.triton_kernels.layout import draws_of, keep_left_below

from . import sparse_checks as checks

KEY = checks.KEY
EVERY = ("reference", *checks.FAST)
BITS = 1 << 18


def unpacked(bits: torch.Tensor) -> torch.Tensor:
    """uint8 [m] -> bool [8 m], least significant bit first."""
    return ((bits[:, None] >> torch.arange(8, dtype=torch.uint8)) & 1).bool().view(-1)


def constant(bit: int, numel: int = BITS) -> torch.Tensor:
    return torch.full((numel // 8,), 255 * bit, dtype=torch.uint8)


def assert_frequency(bits: torch.Tensor, probability: float) -> None:
    """Within five standard deviations of a binomial."""
    count = unpacked(bits)
    sigma = math.sqrt(probability * (1 - probability) / count.numel())
    assert abs(count.double().mean().item() - probability) <= 5 * sigma


@pytest.mark.parametrize("implementation", checks.FAST)
@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("dtype, stride", checks.INPUTS)
@pytest.mark.parametrize("numel", [0, 1, 7, 33, 1023, 1024, 1025, 2999])
def test_signs_agree_with_reference(implementation, with_residual, dtype, stride, numel):
    checks.check_fold(implementation, numel, dtype, stride, with_residual)


@pytest.mark.parametrize("implementation", checks.FAST)
@pytest.mark.parametrize("a, b", [(1, 1), (2, 1), (3, 1), (2, 2), (1, 7), (10**6, 1)])
@pytest.mark.parametrize("numel", [0, 1, 33, 1025, 9001])
def test_merge_agrees_with_reference(implementation, numel, a, b):
    checks.check_merge(implementation, numel, a, b)


# --- bit_merge ---


@pytest.mark.parametrize("a, b", [(1, 1), (2, 1), (3, 1), (2, 2)])
@pytest.mark.parametrize("left", [0, 1])
def test_differing_bits_come_from_the_left_with_its_share_of_the_ranks(a, b, left):
    share = a / (a + b)
    assert_frequency(K.bit_merge(constant(left), constant(1 - left), a, b, KEY), share if left else 1 - share)


@pytest.mark.parametrize("implementation", EVERY)
@pytest.mark.parametrize("a", [1, 2, 3, 7])
def test_merge_with_one_rank_is_the_published_operator(implementation, a):
    """Marsit: (v AND w) OR ((v XOR w) AND r), P(r = 1) = (m - 1) / m where w = 0 and 1 / m where w = 1; m = a + 1."""
    numel, device = 4096, checks.device_of(implementation)
    keep = (philox.uniform(KEY, numel).double() < a / (a + 1)).tolist()
    v, w = checks.random_bits(numel, 0), checks.random_bits(numel, 1)
    merged = checks.fast(implementation, "fold").bit_merge(v.to(device), w.to(device), a, 1, KEY)
    rows = zip(unpacked(v).tolist(), unpacked(w).tolist(), keep, unpacked(merged.cpu()).tolist(), strict=True)
    seen = set()
    for left, right, kept, actual in rows:
        r = kept if not right else not kept
        assert actual == ((left and right) or ((left ^ right) and r))
        seen.add((left, right, r))
    assert len(seen) == 8


def test_equal_bits_never_change():
    bits = checks.random_bits(BITS, 0)
    assert torch.equal(K.bit_merge(bits, bits, 3, 2, KEY), bits)


@pytest.mark.parametrize("signs", [(1, 0, 0, 0), (0, 0, 1, 0), (1, 1, 0, 1)])
def test_chain_and_torus_give_the_mean_of_the_bits(signs):
    chain = constant(signs[0])
    for hop, bit in enumerate(signs[1:], start=1):
        chain = K.bit_merge(chain, constant(bit), hop, 1, KEY._replace(stream=hop))
    rows = [
        K.bit_merge(constant(signs[2 * row]), constant(signs[2 * row + 1]), 1, 1, KEY._replace(stream=10 + row))
        for row in range(2)
    ]
    torus = K.bit_merge(*rows, 2, 2, KEY._replace(stream=12))
    for merged in (chain, torus):
        assert_frequency(merged, sum(signs) / 4)


def test_parts_merged_at_their_offset_are_the_whole():
    left, right = checks.random_bits(4096, 0), checks.random_bits(4096, 1)
    whole = K.bit_merge(left, right, 2, 1, KEY)
    part = K.bit_merge(left[64:], right[64:], 2, 1, KEY._replace(offset=KEY.offset + 8 * 64))
    assert torch.equal(whole[64:], part)


@pytest.mark.parametrize("a, b", [(1, 1), (2, 1), (5, 3), (1, 63), (1000, 1)])
def test_probability_is_rounded_to_the_nearest_draw(a, b):
    assert abs(keep_left_below(a, b) / 65536 - a / (a + b)) <= 2**-17


@pytest.mark.parametrize(
    "left, right, a, b",
    [
        (torch.zeros(4, dtype=torch.uint8), torch.zeros(8, dtype=torch.uint8), 1, 1),
        (torch.zeros(6, dtype=torch.uint8), torch.zeros(6, dtype=torch.uint8), 1, 1),
        (torch.zeros(4, dtype=torch.int32), torch.zeros(4, dtype=torch.int32), 1, 1),
        (torch.zeros(4, dtype=torch.uint8), torch.zeros(4, dtype=torch.uint8), 0, 1),
    ],
)
def test_merge_refuses_bad_arguments(left, right, a, b):
    with pytest.raises(CompressionError):
        K.bit_merge(left, right, a, b, KEY)


# --- one_hot_signs ---


@pytest.mark.parametrize("size", [1, 2, 3, 4, 8])
def test_exactly_one_rank_contributes_to_each_bit(size):
    """All signs positive: the OR of the ranks is all ones, no bit is set twice, and so OR is the sum of words."""
    parts = [K.one_hot_signs(torch.ones(BITS), rank, size, KEY) for rank in range(size)]
    assert torch.equal(torch.stack([unpacked(part) for part in parts]).sum(0), torch.ones(BITS, dtype=torch.int64))
    total = torch.stack([part.view(torch.int32) for part in parts]).sum(0, dtype=torch.int32)
    assert torch.equal(total.view(torch.uint8), constant(1))


@pytest.mark.parametrize("size", [1, 2, 3, 4, 8])
def test_every_rank_owns_its_share_of_the_bits(size):
    for rank in range(size):
        assert_frequency(K.one_hot_signs(torch.ones(BITS), rank, size, KEY), 1 / size)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 8])
def test_sum_of_ranks_has_the_mean_of_their_signs(size):
    for positive in {0, 1, size // 2, size}:
        total = torch.zeros(BITS // 32, dtype=torch.int32)
        for rank in range(size):
            x = torch.full((BITS,), 1.0 if rank < positive else -1.0)
            total += K.one_hot_signs(x, rank, size, KEY).view(torch.int32)
        assert_frequency(total.view(torch.uint8), positive / size)


def test_sum_of_ranks_takes_each_sign_from_a_rank_that_has_it():
    size, numel = 4, 2999
    ranks = [checks.vector(numel, seed=seed) for seed in range(size)]
    total = sum(K.one_hot_signs(x, rank, size, KEY).view(torch.int32) for rank, x in enumerate(ranks))
    owner = (philox.uniform16(KEY, numel).long() * size) >> 16
    signs = torch.stack(ranks).gather(0, owner[None]).squeeze(0) >= 0
    assert torch.equal(unpacked(total.view(torch.uint8))[:numel], signs)


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000, 65536])
def test_owner_intervals_are_the_scaled_draws(size):
    draws = torch.arange(65536)
    owner = (draws * size) >> 16
    for rank in {0, 1 % size, size // 2, size - 1}:
        low, high = draws_of(rank, size)
        assert torch.equal((draws >= low) & (draws < high), owner == rank)


@pytest.mark.parametrize("rank, size", [(0, 0), (2, 2), (-1, 2), (0, 65537)])
def test_one_hot_refuses_a_rank_outside_its_group(rank, size):
    with pytest.raises(CompressionError):
        K.one_hot_signs(torch.ones(4), rank, size, KEY)


# --- sign_bits, signs_expand and the memory ---


@pytest.mark.parametrize("implementation", EVERY)
def test_zero_is_positive_and_nan_is_not(implementation):
    x = torch.tensor([0.0, -0.0, float("nan"), float("inf"), -float("inf"), -1e-45, 1e-45])
    bits = checks.fast(implementation, "fold").sign_bits(x.to(checks.device_of(implementation))).cpu()
    assert unpacked(bits)[:7].tolist() == [True, True, False, True, False, False, True]


@pytest.mark.parametrize("implementation", EVERY)
def test_bits_beyond_the_end_are_zero(implementation):
    x = torch.ones(37, device=checks.device_of(implementation))
    module = checks.fast(implementation, "fold")
    for bits in (module.sign_bits(x), module.one_hot_signs(x, 0, 1, KEY)):
        assert bits.numel() == 8 and unpacked(bits.cpu()).sum() == 37


def test_one_hot_of_a_single_rank_is_sign_bits():
    x = checks.vector(999)
    assert torch.equal(K.one_hot_signs(x, 0, 1, KEY), K.sign_bits(x))


def test_encoders_leave_the_compensated_vector_in_the_residual():
    x, residual = checks.vector(999), checks.vector(999, seed=1)
    one, two = residual.clone(), residual.clone()
    K.sign_bits(x, one)
    K.one_hot_signs(x, 1, 3, KEY, two)
    assert torch.equal(one, x + residual) and torch.equal(two, x + residual)


def test_expand_is_plus_or_minus_eta_and_the_residual_loses_it():
    p = checks.vector(1001)
    residual, bits = p.clone(), checks.random_bits(1001, 2)
    result = K.signs_expand(bits, 1001, 0.3, residual)
    eta = torch.tensor(0.3)
    assert torch.equal(result, torch.where(unpacked(bits)[:1001], eta, -eta))
    assert torch.equal(residual, p - result)
    assert torch.equal(K.signs_expand(bits, 1001, 0.3), result)


@pytest.mark.parametrize("implementation", EVERY)
def test_parts_with_steps_of_their_own_are_what_each_gives_alone(implementation):
    """Parts that begin and end within a word, at a word's edge, in one word, and beyond a tile."""
    sizes = [5, 3, 24, 32, 0, 2000, 1, 64, 870]
    numel, device = sum(sizes), checks.device_of(implementation)
    bits, p, etas = checks.random_bits(numel, 2), checks.vector(numel), torch.rand(len(sizes)) + 0.1
    residual = p.to(device, copy=True)
    module = checks.fast(implementation, "fold")
    result = module.signs_expand_each(bits.to(device), etas.to(device), sizes, residual)
    wanted = (2.0 * unpacked(bits)[:numel] - 1) * torch.cat([eta.expand(size) for eta, size in zip(etas, sizes)])
    assert torch.equal(result.cpu(), wanted) and torch.equal(residual.cpu(), p - wanted)


@pytest.mark.parametrize("etas", [torch.ones(2), torch.ones(1, dtype=torch.float64), torch.ones(1, 1)])
def test_expand_refuses_steps_that_do_not_fit_the_parts(etas):
    with pytest.raises(CompressionError, match="etas must be a contiguous 1-D fp32 tensor of 1 elements"):
        K.signs_expand_each(torch.zeros(4, dtype=torch.uint8), etas, [32])


def test_global_memory_conserves_the_mean():
    """Marsit, exact identity: mean of residuals + applied updates = mean of all gradients, whatever the draws."""
    size, numel = 3, 600
    residuals = [torch.zeros(numel) for _ in range(size)]
    gradients, applied = torch.zeros(numel, dtype=torch.float64), torch.zeros(numel, dtype=torch.float64)
    for step in range(10):
        words = 0
        for rank, residual in enumerate(residuals):
            x = checks.vector(numel, seed=10 * step + rank)
            gradients += x.double() / size
            words = words + K.one_hot_signs(x, rank, size, KEY._replace(step=step), residual).view(torch.int32)
        updates = [K.signs_expand(words.view(torch.uint8), numel, 0.25, residual) for residual in residuals]
        assert all(torch.equal(update, updates[0]) for update in updates)
        applied += updates[0]
    assert torch.allclose(sum(residual.double() for residual in residuals) / size + applied, gradients, atol=1e-12)


def test_expand_refuses_bits_of_another_length():
    with pytest.raises(CompressionError):
        K.signs_expand(torch.zeros(8, dtype=torch.uint8), 32, 1.0)


def test_encoders_refuse_a_residual_of_another_length():
    for encode in (K.sign_bits, lambda x, residual: K.one_hot_signs(x, 0, 2, KEY, residual)):
        with pytest.raises(CompressionError):
            encode(torch.ones(4), residual=torch.zeros(5))
