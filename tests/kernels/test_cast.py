"""The float casts: the formulas of their contract in all implementations, and conversions bit for bit with PyTorch."""

from __future__ import annotations

import pytest
import torch

from compression_plugins import triton_kernels as K
from compression_plugins.errors import CompressionError

from . import dense_checks as checks

ALL = ("reference", *checks.FAST)

# NumPy, on which Triton's interpreter runs, warns where a kernel divides by a zero scale before it selects.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")
KINDS = ("bf16", "fp16", "fp8")
BLOCK = 64
DAMPED = checks.MEMORIES["damped"]


@pytest.mark.parametrize("implementation", ALL)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("numel", checks.LENGTHS)
def test_payload_and_residual_follow_the_formulas(implementation, kind, numel):
    checks.check_cast(implementation, numel, kind, BLOCK, DAMPED)


@pytest.mark.parametrize("implementation", ALL)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("memory", [None, (1.0, 1.0, 1.0)], ids=("none", "plain"))
@pytest.mark.parametrize("dtype, stride", checks.INPUTS)
def test_any_float_dtype_and_stride_is_read(implementation, kind, memory, dtype, stride):
    checks.check_cast(implementation, 1009, kind, BLOCK, memory, dtype, stride)


@pytest.mark.parametrize("implementation", ALL)
@pytest.mark.parametrize("block", [32, 96, 4096, 4128, 10_016])
def test_any_multiple_of_32_is_a_block_of_fp8(implementation, block):
    checks.check_cast(implementation, 5003, "fp8", block, DAMPED)


@pytest.mark.parametrize("implementation", ALL)
def test_tiles_beyond_the_end_of_the_last_block_have_no_part_in_its_scale(implementation):
    torch.use_deterministic_algorithms(True)  # new memory is then filled with what shows
    try:
        checks.check_cast(implementation, 5003, "fp8", 4128, DAMPED)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("implementation", ALL)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ranks", [1, 3])
@pytest.mark.parametrize("numel, block", [(1, 64), (1009, 64), (4999, 4128)])
def test_reduce_is_decode_average_encode(implementation, kind, ranks, numel, block):
    checks.check_reduce("cast", implementation, numel, block, ranks, kind)


@pytest.mark.parametrize("implementation", checks.FAST)
@pytest.mark.parametrize("kind", ["bf16", "fp16"])
def test_half_conversions_agree_with_the_reference_for_every_exponent_and_rounding_case(implementation, kind):
    high = torch.arange(0, 2**16, 3, dtype=torch.int64) << 16  # sign, exponent and 7 bits of mantissa
    low = torch.tensor([0, 1, 0xFFF, 0x1000, 0x1001, 0x3000, 0x7FFF, 0x8000, 0x8001, 0xFFFF])
    bits = (high[:, None] | low).view(-1)
    x = (bits - ((bits >> 31) << 32)).to(torch.int32).view(torch.float32)
    device = checks.device_of(implementation)
    x = x if device == "cuda" or implementation == "cpu" else x[::17].contiguous()
    wanted = checks.reference("cast").cast_encode(x, kind, 32)
    actual = checks.fast(implementation, "cast").cast_encode(x.to(device), kind, 32)
    assert torch.equal(actual.cpu(), wanted)
    checks.check_decode("cast", implementation, wanted, x.numel(), kind, 32)


@pytest.mark.parametrize("implementation", checks.FAST)
def test_fp8_conversion_agrees_with_pytorch_on_every_code_and_midpoint(implementation):
    codes = torch.arange(256, dtype=torch.int32).to(torch.uint8).view(torch.float8_e4m3fn).float()
    codes = codes[codes.isfinite()].sort().values
    x = torch.cat((codes, (codes[1:] + codes[:-1]) / 2, codes * (1 + 2**-20), torch.tensor([448.0])))
    for factor in (1.0, 3e-10, 7e20):  # the largest magnitude is 448: with factor 1 the codes are those of x itself
        wanted = checks.reference("cast").cast_encode(x * factor, "fp8", 1024)
        actual = checks.fast(implementation, "cast").cast_encode(
            (x * factor).to(checks.device_of(implementation)), "fp8", 1024
        )
        assert torch.equal(actual.cpu(), wanted)
        checks.check_decode("cast", implementation, wanted, x.numel(), "fp8", 1024)


def test_overflowing_fp16_sends_infinity_and_keeps_its_residual():
    x, residual = torch.tensor([1.0, 1e6, -1e6]), torch.tensor([0.25, 0.5, 0.75])
    decoded = K.cast_decode(K.cast_encode(x, "fp16", 32, residual=residual), 3, "fp16", 32)
    assert decoded.tolist() == [1.25, float("inf"), -float("inf")]
    assert residual.tolist() == [0.0, 0.5, 0.75]


@pytest.mark.parametrize("implementation", ALL)
def test_every_code_of_fp8_decodes_to_its_value_and_those_of_nan_to_nan(implementation):
    codes = torch.arange(256, dtype=torch.int32).to(torch.uint8)
    for scale in (1.0, 0.0, 3e-39, 1e30):
        payload = torch.cat([torch.full((1,), scale).view(torch.uint8), codes])
        checks.check_decode("cast", implementation, payload, 256, "fp8", 256)
    values = checks.fast(implementation, "cast").cast_decode(
        payload.to(checks.device_of(implementation)), 256, "fp8", 256
    )
    assert values.isnan().nonzero().view(-1).tolist() == [0x7F, 0xFF]


@pytest.mark.parametrize("implementation", ALL)
def test_a_mean_with_a_nan_code_of_fp8_is_a_block_of_nan(implementation):
    payloads = torch.zeros(2, 4 + 32, dtype=torch.uint8)
    payloads[:, :4] = torch.ones(1).view(torch.uint8)
    payloads[1, 4 + 7] = 0xFF
    device = checks.device_of(implementation)
    payload = checks.fast(implementation, "cast").cast_reduce(payloads.to(device), 32, "fp8", 32).cpu()
    assert payload[:4].view(torch.float32).isnan() and not payload[4:].any()


@pytest.mark.parametrize("implementation", ALL)
def test_bad_kind_is_one_clear_error(implementation):
    with pytest.raises(CompressionError, match="kind must be one of"):
        checks.fast(implementation, "cast").cast_encode(torch.ones(4), "fp4", 32)
