"""The quantizer's theory: unbiased, bounded variance, the mu rule, the sparsifier."""

from __future__ import annotations

import math

import pytest
import torch

from compression_plugins import triton_kernels as K
from compression_plugins.errors import CompressionError
from compression_plugins.optimizer.weight_law import least_bits
from compression_plugins.parameter_server import quantizer
from compression_plugins.triton_kernels.philox import uniform

WIDTHS = range(2, 17)


def vector(numel: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(numel, generator=torch.Generator().manual_seed(seed))


def quantize(x: torch.Tensor, bits: int, draw: int) -> torch.Tensor:
    payload = quantizer.encode(x, bits, K.Key(1, 0, draw, 0), float(x.abs().max()))
    assert payload.numel() == quantizer.payload_bytes(x.numel(), bits) == 4 + 4 * math.ceil(x.numel() * bits / 32)
    return quantizer.decode(payload, x.numel(), bits)


@pytest.mark.parametrize("bits", WIDTHS)
def test_every_width_is_the_floor_formula(bits: int) -> None:
    x = vector(1001)
    levels, scale = 2 ** (bits - 1) - 1, x.abs().max()
    expected = torch.floor(x * (levels / scale) + uniform(K.Key(1, 0, 5, 0), 1001)).clamp(-levels, levels)
    got = quantize(x, bits, 5) / (scale / levels)
    # floor(z + u) in fp32 may differ by one where z + u lies within rounding of an integer
    assert (got - expected).abs().max() < 1.01
    assert ((got - expected).abs() > 0.5).float().mean() <= 2e-3


@pytest.mark.parametrize("bits", [2, 3, 5, 8, 11])
def test_quantization_is_unbiased_and_its_variance_is_bounded(bits: int) -> None:
    x, draws = vector(300), 400
    samples = torch.stack([quantize(x, bits, draw) for draw in range(draws)])
    delta = float(x.abs().max()) / (2 ** (bits - 1) - 1)
    z = (samples.mean(0) - x) / (delta / 2 / math.sqrt(draws))  # the standard deviation is at most delta / 2
    assert z.abs().max() < 4.5
    assert abs(float(z.sum())) < 4.5 * math.sqrt(300)
    error = (samples - x).square().sum(1).mean()
    fraction = x / delta - torch.floor(x / delta)
    exact = delta**2 * (fraction * (1 - fraction)).sum()
    assert error <= 300 * delta**2 / 4
    assert error == pytest.approx(float(exact), rel=0.05)


def test_the_largest_elements_are_exact_and_one_element_is_too() -> None:
    for bits in WIDTHS:
        assert quantize(torch.tensor([3.0, -3.0, 0.0]), bits, 0).tolist() == pytest.approx([3.0, -3.0, 0.0], rel=1e-6)
        assert quantize(torch.tensor([-0.7]), bits, 0).tolist() == pytest.approx([-0.7], rel=1e-6)


@pytest.mark.parametrize("mu", [0.01, 0.5, 5.0])
@pytest.mark.parametrize("distance", [3.0, 0.3, 0.03])
def test_the_mu_rule_bounds_the_error_with_the_fewest_bits(mu: float, distance: float) -> None:
    x = vector(2000)
    bits = least_bits(float(x.abs().max()), distance, 2000, mu)
    assert bits is not None
    error = torch.stack([(quantize(x, bits, draw) - x).square().sum() for draw in range(20)]).mean()
    assert error <= mu * distance**2
    coarser = float(x.abs().max()) / (2 ** (bits - 2) - 1) if bits > 2 else math.inf
    assert 2000 * coarser**2 / 4 > mu * distance**2, "one bit less would break the bound that the rule guarantees"


def test_one_bit_more_each_time_the_distance_halves() -> None:
    widths = [least_bits(1.0, 2.0**-k, 10_000, 0.5) for k in range(9)]
    assert widths == list(range(widths[0], widths[0] + 9))


def test_half_a_bit_less_each_time_mu_doubles() -> None:
    widths = [least_bits(1.0, 0.1, 10_000, 0.001 * 4**k) for k in range(6)]
    assert widths == list(range(widths[0], widths[0] - 6, -1))


def test_beyond_16_bits_the_rule_says_full_precision() -> None:
    edge = math.sqrt(10_000 / (4 * 0.5)) / (2**15 - 1)
    assert least_bits(1.0, edge * 1.0001, 10_000, 0.5) == 16
    assert least_bits(1.0, edge * 0.9999, 10_000, 0.5) is None
    assert least_bits(1.0, 0.0, 10_000, 0.5) is None
    assert least_bits(1e30, 1e-300, 10_000, 0.5) is None


@pytest.mark.parametrize("budget", [1.0, 0.3])
def test_the_sparsifier_is_unbiased_with_the_second_moment_of_the_paper(budget: float) -> None:
    x, draws = vector(200), 2000
    scale = float(x.abs().max())
    phi = budget * float(x.abs().sum()) / scale
    total, squares, survivors = torch.zeros(200), [], []
    for draw in range(draws):
        signs, magnitude = quantizer.sparsify(x, scale, budget, K.Key(0, 1, draw, 0))
        assert magnitude == pytest.approx(float(x.abs().sum()) / phi)
        beta = signs * magnitude
        assert bool((beta * x >= 0).all())
        total += beta
        squares.append(float(beta.square().sum()))
        survivors.append(int((signs != 0).sum()))
    deviation = (x.abs() * scale / budget / draws).sqrt()  # of the mean: E beta^2 = |x| * magnitude
    assert ((total / draws - x) / deviation).abs().max() < 4.5
    assert sum(squares) / draws == pytest.approx(float(x.abs().sum()) ** 2 / phi, rel=0.03)
    assert sum(survivors) / draws == pytest.approx(phi, rel=0.03)


def test_a_diverged_vector_is_refused() -> None:
    for bad in (math.nan, math.inf, 1e32):
        with pytest.raises(CompressionError, match="the run diverged; lower lr"):
            quantizer.largest(torch.tensor([1.0, bad]), "the model")
