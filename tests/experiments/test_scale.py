"""The simulation of many ranks."""

from __future__ import annotations

from pathlib import Path

import pytest

from .quick import run_quick


@pytest.mark.nightly
def test_every_topology_is_predicted_and_training_needs_no_more_than_the_workers(tmp_path: Path) -> None:
    headline, records = run_quick("scale", tmp_path)
    assert "32 ranks" in headline
    model = [r for r in records if r["part"] == "model"]
    assert [r["n"] for r in model] == [2, 8, 32]
    assert {key.split()[0] for key in model[0]["step_s"]} == {"flat", "hierarchical", "two-stage"}
    dense = [r["sent"]["none"] for r in model]
    assert [d / dense[0] for d in dense] == pytest.approx([1, 7 / 4, 31 / 16]), "2 (n - 1) / n"
    exact = next(r for r in records if r["part"] == "training" and r["scheme"] == "none")
    assert exact["residual"] == 0 and exact["accuracy"] > 50
