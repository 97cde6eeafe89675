"""The sign codec: the formulas of its contract in all implementations, and its laws."""

from __future__ import annotations

import pytest
import torch

from compression_plugins import triton_kernels as K
from compression_plugins.errors import CompressionError
from compression_plugins.triton_kernels import layout

from . import dense_checks as checks

ALL = ("reference", *checks.FAST)
BLOCK = 64


@pytest.mark.parametrize("implementation", ALL)
@pytest.mark.parametrize("memory", checks.MEMORIES.values(), ids=checks.MEMORIES)
@pytest.mark.parametrize("numel", checks.LENGTHS)
def test_payload_and_residual_follow_the_formulas(implementation, memory, numel):
    checks.check_sign(implementation, numel, BLOCK, memory)


@pytest.mark.parametrize("implementation", ALL)
@pytest.mark.parametrize("dtype, stride", checks.INPUTS)
@pytest.mark.parametrize("numel", [65, 1009])
def test_any_float_dtype_and_stride_is_read(implementation, dtype, stride, numel):
    checks.check_sign(implementation, numel, BLOCK, (0.3, 0.9, 0.7), dtype, stride)


@pytest.mark.parametrize("implementation", ALL)
@pytest.mark.parametrize("block", [32, 96, 4096, 4128, 10_016])
def test_any_multiple_of_32_is_a_block(implementation, block):
    checks.check_sign(implementation, 5003, block, (0.3, 0.9, 0.7))


@pytest.mark.parametrize("implementation", ALL)
@pytest.mark.parametrize("ranks", [1, 3])
@pytest.mark.parametrize("numel, block", [(1, 64), (1009, 64), (4999, 4128)])
def test_reduce_is_decode_average_encode(implementation, ranks, numel, block):
    checks.check_reduce("sign", implementation, numel, block, ranks)


@pytest.mark.parametrize("implementation", ALL)
@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
@pytest.mark.parametrize("numel", [0, 1, 33, 3001])
def test_vote_is_the_majority_and_a_tie_gives_one(implementation, ranks, numel):
    checks.check_vote(implementation, numel, ranks)


@pytest.mark.parametrize("implementation", ALL)
@pytest.mark.parametrize("dtype, stride", checks.INPUTS)
@pytest.mark.parametrize("numel", [0, 1, 33, 1024, 1025, 4999])
def test_draws_follow_the_formula_given_the_norm(implementation, dtype, stride, numel):
    checks.check_draw(implementation, numel, dtype, stride)
    checks.check_draw(implementation, numel, dtype, stride, spoil=True)


@pytest.mark.parametrize("implementation", ALL)
@pytest.mark.parametrize("value, norm", [(0.0, 0.0), (1e-44, 64e-44), (3e38, layout.SCALE_MAX)])
def test_norm_of_draws_neither_vanishes_nor_overflows(implementation, value, norm):
    x = torch.full((4096,), value, device=checks.device_of(implementation))
    payload = checks.fast(implementation, "sign").sign_draw(x, checks.KEY).cpu()
    assert payload[:4].view(torch.float32).item() == pytest.approx(norm, rel=1e-6)
    assert K.sign_decode(payload, 4096, 4096).isfinite().all()


def test_draws_resolve_probabilities_that_sixteen_bits_cannot():
    """An element of 2**-17 of the norm has probability 1/2 + 2**-18, half a step from 1/2 for sixteen random bits."""
    numel = 1 << 22
    x = torch.zeros(numel)
    x[-1] = 1
    before = K.sign_draw(x, checks.KEY)
    x[:-1] = 2.0**-17
    flipped = K.unpack_bits((before ^ K.sign_draw(x, checks.KEY))[4:].clone(), numel - 1, 1).sum().item()
    assert abs(flipped - numel / 2**18) < 4 * (numel / 2**18) ** 0.5  # Poisson, 16 expected


def test_draws_have_the_probability_of_the_contract():
    """Means of 0.6, -0.8 and 0 under the norm 1: three binomials, each within five standard deviations."""
    x, trials = torch.tensor([0.6, -0.8, 0.0]), 4096
    draws = torch.stack([K.sign_decode(K.sign_draw(x, checks.KEY._replace(step=s)), 3, 32) for s in range(trials)])
    assert torch.equal(draws.abs(), torch.ones_like(draws))
    sigma = ((1 - x.double().square()) / trials).sqrt()
    assert ((draws.double().mean(0) - x).abs() < 5 * sigma).all()
    assert abs(torch.corrcoef(draws.T)[0, 1]) < 5 / trials**0.5, "elements are drawn independently"


def test_draws_of_a_part_continue_the_stream():
    x = checks.vector(4096)
    x[:2048] = 0  # so that whole and part have one norm
    whole = K.sign_draw(x, checks.KEY)
    part = K.sign_draw(x[2048:], checks.KEY._replace(offset=checks.KEY.offset + 2048))
    assert torch.equal(whole[4 + 2048 // 8 :], part[4:])


def test_layout_is_scales_then_bits_lsb_first():
    x = torch.tensor([1.0, -1.0, 1.0, 1.0] + [-1.0] * 60 + [3.0])
    payload = K.sign_encode(x, 64)
    assert payload[:8].view(torch.float32).tolist() == [1.0, 3.0]
    assert payload[8:].tolist() == [0b1101, 0, 0, 0, 0, 0, 0, 0, 0b1, 0, 0, 0]


def test_what_is_sent_plus_what_is_remembered_is_what_came_in():
    generator = torch.Generator().manual_seed(0)
    residual, sent, given = torch.zeros(777), torch.zeros(777).double(), torch.zeros(777).double()
    for _ in range(50):
        x = torch.randn(777, generator=generator)
        given += x
        sent += K.sign_decode(K.sign_encode(x, 64, residual=residual), 777, 64)
    torch.testing.assert_close(sent + residual, given, rtol=0, atol=1e-4)


def test_short_block_is_averaged_over_its_own_elements():
    payload = K.sign_encode(torch.full((65,), 2.0), 64)
    assert payload[:8].view(torch.float32).tolist() == [2.0, 2.0]


def test_scale_of_a_huge_finite_block_is_finite():
    x = torch.full((4096,), torch.finfo(torch.float32).max)
    assert torch.equal(K.sign_decode(K.sign_encode(x, 4096), 4096, 4096), x)


@pytest.mark.parametrize("implementation", ALL)
@pytest.mark.parametrize(
    "call, complaint",
    [
        (lambda m, x: m.sign_encode(x, 48), "multiple of 32"),
        (lambda m, x: m.sign_encode(x, 0), "multiple of 32"),
        (lambda m, x: m.sign_encode(x.double(), 64), "fp32, fp16 or bf16"),
        (lambda m, x: m.sign_encode(x.view(10, 10), 64), "1-D"),
        (lambda m, x: m.sign_encode(x, 64, x[:50].clone()), "residual must be"),
        (lambda m, x: m.sign_encode(x, 64, x.half()), "residual must be"),
        (lambda m, x: m.sign_encode(x, 64, x.repeat(2)[::2]), "residual must be"),
        (lambda m, x: m.sign_encode(x, 64, out=x.new_empty(23, dtype=torch.uint8)), "24 bytes"),
        (lambda m, x: m.sign_encode(x, 64, out=x.new_empty(25, dtype=torch.uint8)[1:]), "4-byte boundary"),
        (lambda m, x: m.sign_decode(m.sign_encode(x, 64), 99, 32), "32 bytes"),
        (lambda m, x: m.sign_decode(m.sign_encode(x, 64), 100, 64, accumulate=True), "needs out="),
        (lambda m, x: m.sign_decode(m.sign_encode(x, 64), 100, 64, out=x.half()), "out must be"),
        (lambda m, x: m.sign_reduce(m.sign_encode(x, 64), 100, 64), "shape"),
        (lambda m, x: m.sign_draw(x.double(), checks.KEY), "fp32, fp16 or bf16"),
        (lambda m, x: m.sign_draw(x, checks.KEY, out=x.new_empty(16, dtype=torch.uint8)), "20 bytes"),
    ],
)
def test_bad_input_is_one_clear_error(implementation, call, complaint):
    with pytest.raises(CompressionError, match=complaint):
        call(checks.fast(implementation, "sign"), torch.ones(100, device=checks.device_of(implementation)))
