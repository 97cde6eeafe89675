"""Rows are appended only, nothing finished is measured twice, and an interrupted run goes on."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from compression_plugins.errors import ConfigError
from launch.bench import hosts, models
from launch.bench.cells import Cell
from launch.bench.runner import Runner, expected_s
from launch.bench.settings import Choice
from launch.bench.store import Store, read
from launch.lab.jobs import Job, JobError, Loopback

from .isolation import counts_bytes

CELL = Cell("speed", "horovod", "none", "mlp", 2, "unlimited", 0, 5)
CELLS = [replace(CELL, seed=seed) for seed in range(4)]


class Recorded(Runner):
    """Measures nothing: says which seed it was asked for, and fails where it is told to."""

    fails: set[int] = set()

    def _figures(self, cell: Cell, folder: Path) -> dict[str, Any]:
        self.asked = [*getattr(self, "asked", []), cell.seed]
        if cell.seed in self.fails:
            raise JobError("the job ended with status 1\nout of memory")
        return {"step_s": 0.1, "sent_bytes": 1.0}


def bench(store: Store, **settings: Any) -> Recorded:
    choices = {"none": Choice("none")}
    return Recorded(store, store.path.parent / "runs", choices, {"commit": None}, 10, lambda line: None, **settings)


def test_a_second_start_measures_only_what_is_missing(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    with Store(path) as store:
        assert bench(store).run(CELLS[:2]).measured == 2
    before = path.read_bytes()
    with Store(path) as store:
        runner = bench(store)
        assert runner.run(CELLS).measured == 2
    assert runner.asked == [2, 3]
    assert path.read_bytes().startswith(before), "rows are never rewritten"
    assert [row["seed"] for row in read(path)] == [0, 1, 2, 3]


def test_a_half_written_last_line_is_dropped_and_its_cell_measured_again(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    with Store(path) as store:
        bench(store).run(CELLS[:3])
    whole = path.read_bytes()
    path.write_bytes(whole[:-20])
    assert [row["seed"] for row in read(path)] == [0, 1]
    with Store(path) as store:
        assert store.dropped
        runner = bench(store)
        runner.run(CELLS[:3])
    assert runner.asked == [2]
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["seed"] for row in rows] == [0, 1, 2]


def test_a_failed_cell_is_a_row_with_its_error_and_is_tried_again(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    with Store(path) as store:
        runner = bench(store)
        runner.fails = {1}
        outcome = runner.run(CELLS)
    assert (outcome.measured, outcome.failed, outcome.left) == (3, 1, 0)
    assert "out of memory" in read(path)[1]["error"]
    with Store(path) as store:
        runner = bench(store)
        assert runner.run(CELLS).measured == 1 and runner.asked == [1]
        assert all(store.finished(cell.key) for cell in CELLS)
    assert len(read(path)) == 5


def test_what_would_end_after_the_time_limit_is_not_begun(tmp_path: Path) -> None:
    with Store(tmp_path / "results.jsonl") as store:
        outcome = bench(store).run(CELLS, limit_minutes=1e-6)
    assert (outcome.measured, outcome.left) == (0, 4)


def test_remaining_time_is_the_median_of_the_cells_that_are_most_alike() -> None:
    rows = [{**CELL.settings(), "wall_s": seconds} for seconds in (1.0, 2.0, 9.0)]
    rows += [{**CELL.settings(), "model": "cnn", "wall_s": 50.0}, {**CELL.settings(), "wall_s": 99.0, "error": "x"}]
    assert expected_s(CELL, rows) == 2.0
    assert expected_s(replace(CELL, model="cnn", ranks=8), rows) == 50.0


def test_two_runs_do_not_write_one_file(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    with Store(path), pytest.raises(ConfigError, match="in use by another run"), Store(path):
        pass


def test_a_broken_line_in_the_middle_is_named_and_nothing_is_lost(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    path.write_text('{"key": "a"}\nnonsense\n{"key": "b"}\n')
    with pytest.raises(ConfigError, match="line 2: not a JSON object"), Store(path):
        pass
    assert "nonsense" in path.read_text()


def test_an_interruption_ends_the_job_and_leaves_no_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = Job([["sleep", "60"]])

    def interrupted(timeout: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(job, "wait", interrupted)
    monkeypatch.setattr(hosts, "laboratory", lambda ranks, rate: Loopback(ranks))
    monkeypatch.setattr(hosts, "start", lambda *arguments: job)
    monkeypatch.setattr(models, "load", lambda *arguments: models.PERCEPTRON)
    with Store(tmp_path / "results.jsonl") as store:
        runner = Runner(store, tmp_path / "runs", {"none": Choice("none")}, {}, 10)
        with pytest.raises(KeyboardInterrupt):
            runner.run([CELL])
        assert not store.rows
    assert job._processes[0].poll() is not None


@pytest.mark.nightly
@pytest.mark.hosts
@counts_bytes
def test_a_real_cell_counts_the_bytes_that_bf16_sends_and_is_done_then(tmp_path: Path) -> None:
    from compression_plugins.config import Config
    from launch.bench.provenance import provenance

    config = Config.load("bf16").to_dict()
    choice = Choice("bf16", config, "bf16")
    cell = Cell("speed", "horovod", "bf16", "mlp", 2, "unlimited", 0, 2, 1, config=config)
    file = tmp_path / "experiment.yaml"
    file.write_text("")
    with Store(tmp_path / "results.jsonl") as store:
        runner = Runner(store, tmp_path / "runs", {"bf16": choice}, provenance(file), 120)
        runner.run([cell])
        row = store.rows[cell.key]
        assert "error" not in row, row["error"]
        assert runner.run([cell]).measured == 0
    payload = 2 * row["numel"]  # each of two ranks: half of the sum, and half of the mean, in two bytes
    assert 0.99 * payload < row["payload_bytes"] < 1.01 * payload
    assert payload < row["sent_bytes"] < 1.3 * payload
    assert 0 < row["compute_s"] and 0 < row["step_s"] and row["ratio"] == pytest.approx(2, rel=0.01)
    assert row["provenance"]["versions"]["torch"] and row["provenance"]["experiment"] == "experiment"
