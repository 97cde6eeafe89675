"""A model of shapes computes exactly as long as it is told, and returns the same gradients whatever a host does."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from compression_plugins.advise.compute import from_shapes
from compression_plugins.advise.shapes import Shapes, load
from compression_plugins.engine.plan import TensorSpec
from launch.bench.synthetic import Clock, Still, Synthetic


class Time:
    """Passes only while somebody sleeps; `late` is what every sleep takes too long."""

    def __init__(self, late: float = 0.0) -> None:
        self.now, self.late, self.marks = 0.0, late, []

    def sleep(self, seconds: float) -> None:
        self.now += seconds + self.late

    def clock(self) -> Clock:
        return Clock(self.sleep, lambda: self.now)


def small() -> Shapes:
    specs = (TensorSpec("a.weight", (4, 3), "float32"), TensorSpec("b.0.weight", (5,), "float32"))
    return Shapes("small", specs, (30.0, 10.0), head_flops=20.0)


@pytest.mark.parametrize("late", [0.0, 60e-6])
def test_a_step_without_communication_takes_the_given_time(late: float) -> None:
    time = Time(late)
    model = Synthetic(load("resnet50"), 0.1, 0, time.clock())
    for _ in range(3):
        model(torch.zeros(())).backward()
    assert time.now == pytest.approx(0.3, abs=2 * late + 1e-9)


def test_gradients_are_complete_when_the_advisor_says() -> None:
    time = Time()
    model = Synthetic(load("gpt2"), 0.2, 0, time.clock())
    done: dict[str, float] = {}
    names = {parameter: name for name, parameter in model.named_parameters()}

    def complete(parameter: torch.Tensor) -> None:
        done[names[parameter]] = time.now

    for parameter in names:
        parameter.register_post_accumulate_grad_hook(complete)
    model(torch.zeros(())).backward()
    predicted = from_shapes(load("gpt2"), compute_ms=200)
    assert list(done) == [spec.name for spec in reversed(predicted.specs)]
    for spec, ready in zip(predicted.specs, predicted.ready_s):
        assert done[spec.name] == pytest.approx(predicted.forward_s + ready, abs=1e-9)


def test_parameters_have_the_names_shapes_and_order_of_the_table() -> None:
    for name in ("resnet50", "gpt2"):
        found = [(n, tuple(p.shape)) for n, p in Synthetic(load(name), 0.1, 0).named_parameters()]
        assert found == [(spec.name, spec.shape) for spec in load(name).specs]


def test_a_gradient_stays_the_same_when_a_host_averages_it_in_place() -> None:
    model = Synthetic(small(), 0.0, 0, Time().clock())
    model.personal(1)
    optimizer = Still(model.parameters())
    seen = []
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.zeros(())).backward()
        seen.append([parameter.grad.clone() for parameter in model.parameters()])
        for parameter in model.parameters():
            parameter.grad.zero_()
        optimizer.step()
    for one, other in pairwise(seen):
        for mine, same in zip(one, other):
            assert torch.equal(mine, same) and mine.abs().sum() > 0


def test_ranks_share_half_of_the_variance_of_their_gradients() -> None:
    one, other = (Synthetic(load("mlp"), 0.0, 0, Time().clock()) for _ in range(2))
    one.personal(0)
    other.personal(1)
    cosine = torch.nn.functional.cosine_similarity(one._pool, other._pool, dim=0)
    assert cosine == pytest.approx(0.5, abs=0.01)
