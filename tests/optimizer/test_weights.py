"""The mu rule of double quantization and its model side."""

from __future__ import annotations

import math

import pytest
import torch

from compression_plugins import triton_kernels as K
from compression_plugins.optimizer.quantized_weights import QuantizedWeights
from compression_plugins.optimizer.weight_law import WeightLaw, mu_rule_bits, weight_codec


@pytest.mark.parametrize("mu", [0.01, 0.5, 5.0])
@pytest.mark.parametrize("distance", [3.0, 3e-1, 3e-2])
def test_the_mu_rule_bounds_the_error_of_the_weights(mu: float, distance: float) -> None:
    x = torch.randn(2000, generator=torch.Generator().manual_seed(0))
    bits = mu_rule_bits(float(x.abs().max()), distance, x.numel(), mu)
    if bits is None:
        pytest.fail("16 bits suffice for all of these")
    codec = weight_codec(bits, x.numel())
    errors = [(codec.decode(codec.encode(x, K.Key(0, 0, s, 0)), x.numel()) - x).square().sum() for s in range(20)]
    assert torch.stack(errors).mean() <= mu * distance**2


def test_fewer_bits_would_break_the_rule_where_widths_allow_to_tell() -> None:
    largest, numel, mu = 1.0, 10_000, 0.5
    for needed in range(5, 9):  # the real-valued rule asks for just `needed` bits, the next width is 8
        distance = largest * math.sqrt(numel / (4 * mu)) / (2 ** (needed - 1) - 1) * 1.0001
        assert mu_rule_bits(largest, distance, numel, mu) == 8
    assert mu_rule_bits(largest, 1e6, numel, mu) == 4
    assert mu_rule_bits(largest, 1e-6, numel, mu) is None
    assert mu_rule_bits(largest, 0.0, numel, mu) is None
    assert mu_rule_bits(math.nan, 1.0, numel, mu) is None


LAW = WeightLaw(mu=0.5, snapshot_steps=4)


def train(parameter: torch.Tensor, weights: QuantizedWeights, steps: int) -> None:
    for step in range(steps):
        weights.before_forward()
        weights.after_backward()
        with torch.no_grad():
            parameter.sub_(0.01 * torch.sin(parameter + step))
        weights.after_step(step)


def test_the_optimizer_keeps_full_precision() -> None:
    plain = torch.nn.Parameter(torch.linspace(-1, 1, 5000))
    quantized = torch.nn.Parameter(plain.detach().clone())
    weights = QuantizedWeights(LAW, [("w", quantized)])
    for step in range(10):
        weights.before_forward()
        since = (step - 1) % 4
        assert torch.equal(plain, quantized) == (step == 0 or since == 0), "gradients are taken at quantized weights"
        weights.after_backward()
        assert torch.equal(plain, quantized), "the step starts from, and ends at, the exact weights"
        with torch.no_grad():
            for p in (plain, quantized):
                p.sub_(0.01 * torch.sin(p + step))
        weights.after_step(step)
        assert torch.equal(plain, quantized)


def test_what_a_script_writes_between_steps_is_kept_to_the_last_bit() -> None:
    parameter = torch.nn.Parameter(torch.randn(100, 7))
    weights = QuantizedWeights(LAW, [("w", parameter)])
    train(parameter, weights, 3)
    with torch.no_grad():
        parameter[3] = 0
    edited = parameter.detach().clone()
    weights.before_forward()
    assert not torch.equal(parameter, edited), "else nothing is quantized"
    weights.after_backward()
    assert torch.equal(parameter, edited)


def test_exact_weights_are_to_be_had_in_the_middle_of_a_step_and_the_quantized_ones_come_back() -> None:
    parameter = torch.nn.Parameter(torch.randn(100, 7))
    weights = QuantizedWeights(LAW, [("w", parameter)])
    train(parameter, weights, 3)
    exact = parameter.detach().clone()
    weights.before_forward()
    quantized = parameter.detach().clone()
    with weights.exact():
        assert torch.equal(parameter, exact)
    assert torch.equal(parameter, quantized) and not torch.equal(exact, quantized)


def test_two_groups_of_weights_share_no_draws() -> None:
    values = torch.randn(4000)
    drawn = []
    for name in ("encoder", "decoder"):
        parameter = torch.nn.Parameter(values.clone())
        weights = QuantizedWeights(LAW, [(name, parameter)])
        train(parameter, weights, 3)
        weights.before_forward()
        drawn.append(parameter.detach())
    assert not torch.equal(*drawn)


def test_a_resume_continues_bit_for_bit() -> None:
    one = torch.nn.Parameter(torch.linspace(-1, 1, 300))
    first = QuantizedWeights(LAW._replace(snapshot_steps=3), [("w", one)])
    train(one, first, 6)
    two = torch.nn.Parameter(one.detach().clone())
    second = QuantizedWeights(LAW._replace(snapshot_steps=3), [("w", two)])
    second.load_state_dict(first.state_dict())
    exact = one.detach().clone()
    for weights in (first, second):
        weights.before_forward()
    assert torch.equal(one, two) and not torch.equal(one, exact)
