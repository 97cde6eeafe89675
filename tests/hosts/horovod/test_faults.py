"""Whatever a script does between backward and step, it gets what Horovod gives: no step, two, a scaled one.

`scripts/faults_steps.py` makes the cases; `stock` is Horovod's own compressor in the same script.
"""

from __future__ import annotations

from collections.abc import Callable
from statistics import median
from typing import Any

import pytest

from compression_plugins.schemes import registry

from .faults import FAST, REMEMBER, same

SCHEMES = [name for name in registry.names() if name != "none"]


@pytest.fixture(scope="module")
def steps(horovodrun: Callable[..., Any]) -> list[dict[str, Any]]:
    return horovodrun(script="faults.py", arguments=["faults_steps"], timeout=280, **FAST).results


@pytest.mark.parametrize("scheme", ["stock", *REMEMBER])
def test_gradients_that_are_thrown_away_never_arrive(steps: list[dict[str, Any]], scheme: str) -> None:
    assert same(steps, f"thrown_away_gradients_never_arrive[{scheme}]") == 0.0


@pytest.mark.parametrize("scheme", ["stock", *REMEMBER])
def test_a_step_that_is_thrown_away_leaves_the_trajectory(steps: list[dict[str, Any]], scheme: str) -> None:
    assert same(steps, f"a_thrown_away_step_leaves_the_trajectory[{scheme}]") <= 1e-6


@pytest.mark.parametrize("scheme", ["stock", *REMEMBER])
def test_a_generator_never_moves_by_the_loss_of_its_critic(steps: list[dict[str, Any]], scheme: str) -> None:
    found = same(steps, f"a_generator_never_moves_by_the_loss_of_its_critic[{scheme}]")
    assert found["generator"] == 0.0 and found["critic"] > 0.1, found


@pytest.mark.parametrize("way", ["plain", "thrown away", "synchronized twice"])
def test_what_is_applied_and_remembered_is_what_came_in(steps: list[dict[str, Any]], way: str) -> None:
    assert same(steps, "what_is_applied_and_remembered_is_what_came_in")[way] <= 1e-5


def test_momentum_before_compression_is_taken_once_a_step(steps: list[dict[str, Any]]) -> None:
    assert max(same(steps, "momentum_before_compression_is_taken_once")) <= 1e-6


def test_a_frozen_variance_begins_as_adam(steps: list[dict[str, Any]]) -> None:
    assert same(steps, "a_frozen_variance_begins_as_adam") <= 1e-5


def test_an_optimizer_with_moments_of_its_own_is_refused(steps: list[dict[str, Any]]) -> None:
    (said,) = same(steps, "an_optimizer_with_moments_of_its_own_is_refused")
    assert "Adam is another optimizer: use torch.optim.SGD(lr=...), or direction: gradient" in said


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_second_synchronize_changes_nothing(steps: list[dict[str, Any]], scheme: str) -> None:
    # Stock averages equal gradients again, which is exact for two ranks.
    assert same(steps, f"a_second_synchronize_changes_nothing[{scheme}]") == 0.0


def test_clipping_between_two_synchronizations_equals_stock(steps: list[dict[str, Any]]) -> None:
    found = same(steps, "clipping_between_two_synchronizations_equals_stock")
    assert len(found) == 2 and max(found.values()) <= 1e-6, found


def test_what_a_rank_adds_between_two_synchronizations_is_averaged(steps: list[dict[str, Any]]) -> None:
    distance, stock_identical, ours_identical = same(steps, "what_a_rank_adds_between_two_synchronizations_is_averaged")
    assert stock_identical and ours_identical and distance <= 1e-6


@pytest.mark.parametrize("way", ["step", "synchronize, step"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_warm_up_lasts_ten_optimizer_steps_of_stock(steps: list[dict[str, Any]], scheme: str, way: str) -> None:
    during, after = same(steps, f"warm_up_counts_optimizer_steps[{scheme}]")[way]
    assert during <= 1e-6, "the dense part is stock's"
    assert after > 0.0, "and it ends"


@pytest.mark.parametrize("course", ["growth", "back-off"])
@pytest.mark.parametrize("scheme", ["stock", "topk", "ef_signsgd", "scalecom"])
def test_a_loss_scaler_changes_nothing(steps: list[dict[str, Any]], scheme: str, course: str) -> None:
    found = same(steps, f"a_loss_scaler_changes_nothing[{scheme}]")[course]
    distance, least, most, moved = found
    assert most >= 4 * least and moved > 0, "the scale moved, and so did the weights"
    assert distance <= 1e-5


@pytest.mark.parametrize("scheme", ["stock", "marsit"])
def test_a_scale_comes_when_a_gradient_does(steps: list[dict[str, Any]], scheme: str) -> None:
    """A of x W + x A B has no gradient before B has moved; eta_s is chosen at a flush, every 100 steps."""
    found = same(steps, f"a_scale_comes_when_a_gradient_does[{scheme}]")
    late, always = found["late"], found["always"]
    assert late[0] == 0.0, "the case: nothing at the first flush"
    assert max(late[1:6]) > 0.0, "it moves as soon as it has a gradient"
    # No jump either: a matrix that always had a gradient is the measure, which includes its own flush at step 100.
    assert max(late) <= 4 * max(always), (max(late), max(always))
    assert median(late[50:]) <= 4 * median(always[50:])
