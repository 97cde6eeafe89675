"""The mu rule of double quantization and its model side."""

from __future__ import annotations

import math

import pytest
import torch

from compression_plugins import triton_kernels as K
from compression_plugins.schemes.double_quantization import DoubleQuantization
from compression_plugins.weights import QuantizedWeights, mu_rule_bits, weight_codec


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


def train(parameter: torch.Tensor, weights: QuantizedWeights, steps: int) -> None:
    for step in range(steps):
        weights.restore()
        with torch.no_grad():
            parameter.sub_(0.01 * torch.sin(parameter + step))
        weights.quantize(step)


def test_the_optimizer_keeps_full_precision() -> None:
    plain = torch.nn.Parameter(torch.linspace(-1, 1, 5000))
    quantized = torch.nn.Parameter(plain.detach().clone())
    weights = QuantizedWeights(DoubleQuantization(snapshot_steps=4), [("w", quantized)])
    for step in range(10):
        weights.restore()
        with torch.no_grad():
            for p in (plain, quantized):
                p.sub_(0.01 * torch.sin(p + step))
        assert torch.equal(plain, quantized), "the step starts from, and ends at, the exact weights"
        weights.quantize(step)
        assert torch.equal(plain, quantized) == (step % 4 == 0), "the model computes with quantized weights in between"


def test_weights_that_somebody_overwrote_are_kept() -> None:
    parameter = torch.nn.Parameter(torch.randn(100))
    weights = QuantizedWeights(DoubleQuantization(), [("w", parameter)])
    train(parameter, weights, 3)
    parameter.data.numpy().fill(7.0)  # as from C++: torch's version counter does not move
    weights.restore()
    assert (parameter == 7).all()


def test_a_resume_continues_bit_for_bit() -> None:
    one = torch.nn.Parameter(torch.linspace(-1, 1, 300))
    first = QuantizedWeights(DoubleQuantization(snapshot_steps=3), [("w", one)])
    train(one, first, 5)
    two = torch.nn.Parameter(one.detach().clone())
    second = QuantizedWeights(DoubleQuantization(snapshot_steps=3), [("w", two)])
    second.load_state_dict(first.state_dict())
    for weights in (first, second):
        weights.restore()
        weights.quantize(5)
    assert torch.equal(one, two)


def test_of_many_weights_only_those_that_somebody_overwrote_are_kept() -> None:
    names = ("a", "b", "c")
    parameters = [torch.nn.Parameter(torch.randn(40, 30)) for _ in names]
    alone = [torch.nn.Parameter(p.detach().clone()) for p in parameters]
    together = QuantizedWeights(DoubleQuantization(), list(zip(names, parameters)))
    each = [QuantizedWeights(DoubleQuantization(), [(name, p)]) for name, p in zip(names, alone)]
    for step in range(3):
        for weights, ps in [(together, parameters), *((one, [p]) for one, p in zip(each, alone))]:
            weights.restore()
            with torch.no_grad():
                for p in ps:
                    p.sub_(0.01 * torch.sin(p + step))
            weights.quantize(step)
    parameters[1].data.numpy().fill(7.0)
    together.restore()
    for weights in each:
        weights.restore()
    assert (parameters[1] == 7).all()
    assert torch.equal(parameters[0], alone[0]) and torch.equal(parameters[2], alone[2])
