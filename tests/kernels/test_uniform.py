"""The uniform codec: the formulas of its contract in all implementations, unbiasedness and error bounds."""

from __future__ import annotations

import pytest
import torch

from compression_plugins import triton_kernels as K
from compression_plugins.errors import CompressionError

from . import dense_checks as checks

ALL = ("reference", *checks.FAST)

# NumPy, on which Triton's interpreter runs, warns where a kernel divides by a zero scale before it selects.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")
BLOCK = 64
DAMPED = checks.MEMORIES["damped"]


@pytest.mark.parametrize("implementation", ALL)
@pytest.mark.parametrize("bits", [2, 4, 8, 16])
@pytest.mark.parametrize("numel", checks.LENGTHS)
def test_payload_and_residual_follow_the_formulas(implementation, bits, numel):
    checks.check_uniform(implementation, numel, bits, BLOCK, "absmax", "stochastic", DAMPED)


@pytest.mark.parametrize("implementation", ALL)
@pytest.mark.parametrize("bits", [2, 4, 8, 16])
@pytest.mark.parametrize("scale, rounding", [("absmax", "nearest"), ("l2", "stochastic"), ("l2", "nearest")])
@pytest.mark.parametrize("memory", [None, (1.0, 1.0, 1.0)], ids=("none", "plain"))
def test_every_scale_and_rounding_follows_the_formulas(implementation, bits, scale, rounding, memory):
    checks.check_uniform(implementation, 1009, bits, BLOCK, scale, rounding, memory)


@pytest.mark.parametrize("implementation", ALL)
@pytest.mark.parametrize("dtype, stride", checks.INPUTS)
def test_any_float_dtype_and_stride_is_read(implementation, dtype, stride):
    checks.check_uniform(implementation, 1009, 8, BLOCK, "absmax", "stochastic", DAMPED, dtype, stride)


@pytest.mark.parametrize("implementation", ALL)
@pytest.mark.parametrize("block", [32, 96, 4096, 4128, 10_016])
def test_any_multiple_of_32_is_a_block(implementation, block):
    checks.check_uniform(implementation, 5003, 4, block, "absmax", "stochastic", DAMPED)
    checks.check_uniform(implementation, 5003, 8, block, "l2", "nearest", DAMPED)


@pytest.mark.parametrize("implementation", ALL)
@pytest.mark.parametrize("ranks", [1, 3])
@pytest.mark.parametrize("numel, block", [(1, 64), (1009, 64), (4999, 4128)])
def test_reduce_is_decode_average_encode(implementation, ranks, numel, block):
    checks.check_reduce("uniform", implementation, numel, block, ranks)


@pytest.mark.parametrize("implementation", ALL)
@pytest.mark.parametrize("bits", [2, 4, 8, 16])
@pytest.mark.parametrize("numel", checks.LENGTHS)
def test_rounding_in_place_is_encode_then_decode_of_one_block(implementation, bits, numel):
    checks.check_round(implementation, numel, bits)


@pytest.mark.parametrize("implementation", ALL)
@pytest.mark.parametrize("scale", [0.0, 1e-39])
def test_a_scale_too_small_for_a_grid_rounds_to_zero(implementation, scale):
    x = torch.full((9,), 1e-40, device=checks.device_of(implementation))
    assert not checks.fast(implementation, "uniform").uniform_round(x, 8, scale, checks.KEY).any()


@pytest.mark.parametrize("scale", ["absmax", "l2"])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_stochastic_rounding_is_unbiased_with_the_variance_of_a_coin(bits, scale):
    trials, numel = 2000, 256
    x = torch.randn(numel, generator=torch.Generator().manual_seed(0))
    total, squares = torch.zeros(numel).double(), torch.zeros(numel).double()
    for step in range(trials):
        payload = K.uniform_encode(x, bits, numel, K.Key(3, 2, step, 0), scale)
        error = K.uniform_decode(payload, numel, bits, numel).double() - x
        total += error
        squares += error.square()
    width = float(payload[:4].view(torch.float32)) / (2 ** (bits - 1) - 1)
    fraction = x.double() / width - torch.floor(x.double() / width)
    variance = width**2 * fraction * (1 - fraction)
    z = total / (trials * variance).sqrt()
    normal = fraction * (1 - fraction) > 0.05  # rarer events are Poisson, not normal, in this many trials
    assert z[normal].abs().max() < 5 and abs(z[normal].mean()) < 5 / int(normal.sum()) ** 0.5
    assert abs(total.sum()) < 5 * (trials * variance.sum()).sqrt()
    assert 0.97 < squares.sum() / trials / variance.sum() < 1.03


@pytest.mark.parametrize("rounding, bound", [("nearest", 0.5), ("stochastic", 1.0)])
@pytest.mark.parametrize("bits", [2, 4, 8, 16])
def test_error_is_at_most_one_step_or_half_a_step(bits, rounding, bound):
    x = torch.randn(5000, generator=torch.Generator().manual_seed(1))
    payload = K.uniform_encode(x, bits, 64, checks.KEY, "absmax", rounding)
    scales, _ = K.layout.split(payload, K.layout.blocks(5000, 64))
    step = (scales / (2 ** (bits - 1) - 1)).repeat_interleave(64)[:5000]
    error = (K.uniform_decode(payload, 5000, bits, 64) - x).abs()
    assert (error <= step * (bound + 2e-3)).all()


def test_random_numbers_depend_on_the_element_and_not_on_the_cut():
    """A vector encoded in two halves, the second with its offset, gives the codes of the whole."""
    x = torch.randn(1024, generator=torch.Generator().manual_seed(2))
    whole = K.uniform_encode(x, 8, 64, K.Key(1, 2, 3, 4))
    halves = [K.uniform_encode(x[i : i + 512], 8, 64, K.Key(1, 2, 3, 4, offset=i)) for i in (0, 512)]
    codes = torch.cat([K.layout.split(half, 8)[1] for half in halves])
    assert torch.equal(K.layout.split(whole, 16)[1], codes)


def test_layout_is_scales_then_twos_complement_codes_lsb_first():
    payload = K.uniform_encode(torch.tensor([7.0, -7.0, 1.0, -1.0, 0.0]), 4, 32, None, "absmax", "nearest")
    assert payload[:4].view(torch.float32).tolist() == [7.0]
    assert payload[4:].tolist() == [0x97, 0xF1, 0x00, 0x00]


@pytest.mark.parametrize("implementation", ALL)
@pytest.mark.parametrize("bits", [2, 4, 8, 16])
@pytest.mark.parametrize("magnitude", [1e-45, 1e-38, 1e-36, 1e-34, 3.4028234e38])
def test_tiny_and_huge_blocks_decode_to_finite_numbers(implementation, bits, magnitude):
    """Either the block is sent on its grid, or, where 1 / scale would overflow, as zeros with everything remembered."""
    x = torch.full((32,), magnitude)
    x[1::2] *= -1
    residual = torch.zeros(32)
    payload, after = checks.encode(
        "uniform", implementation, x, bits, 32, None, "absmax", "nearest", residual=residual, memory=(1.0, 1.0, 1.0)
    )
    q = checks.reference("uniform").uniform_decode(payload, 32, bits, 32)
    sent = magnitude >= (2 ** (bits - 1) - 1) * 2.94e-39
    torch.testing.assert_close(q, x if sent else torch.zeros(32), rtol=1e-4, atol=0)
    assert torch.equal(after, x - q)


@pytest.mark.parametrize("implementation", ALL)
@pytest.mark.parametrize(
    "settings, complaint",
    [
        ((3, 64, checks.KEY), "bits must be one of"),
        ((8, 40, checks.KEY), "multiple of 32"),
        ((8, 64, None), "needs a Philox key"),
        ((8, 64, checks.KEY, "max"), "scale must be one of"),
        ((8, 64, checks.KEY, "l2", "up"), "rounding must be one of"),
        ((8, 64, K.Key(0, 0, 0, 0, 0, 4)), "multiple of 8"),
        ((8, 64, K.Key(0, -1, 0, 0)), "non-negative"),
    ],
)
def test_bad_settings_are_one_clear_error(implementation, settings, complaint):
    module = checks.fast(implementation, "uniform")
    with pytest.raises(CompressionError, match=complaint):
        module.uniform_encode(torch.ones(100, device=checks.device_of(implementation)), *settings)
