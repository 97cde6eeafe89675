"""The commands of docs/benchmarks/bench.md, as a reader types them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

pytestmark = [pytest.mark.hosts, pytest.mark.alone]


def command(*arguments: str | Path) -> str:
    """Its output; the same as `compression-plugins ...`."""
    words = [sys.executable, "-m", "compression_plugins", *map(str, arguments)]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_a_bench_measures_its_cells_once_counts_their_bytes_and_reports(tmp_path: Path) -> None:
    pytest.importorskip("horovod.torch")
    out = tmp_path / "quick"
    assert "done" not in command("bench", "launch/bench/quick.yaml", "--dry-run", "--out", out)
    assert "0 failed, 0 left" in command("bench", "launch/bench/quick.yaml", "--out", out)
    assert "0 cells measured" in command("bench", "launch/bench/quick.yaml", "--out", out)
    rows = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    timed = {row["scheme"]: row for row in rows if row["kind"] == "speed"}
    assert set(timed) == {"none", "bf16", "fake", "scalecom", "ddp/none", "ddp/bf16"}
    half = 2 * timed["bf16"]["numel"]  # each of two ranks sends two bytes a value
    assert 0.99 * half < timed["bf16"]["payload_bytes"] < 1.01 * half
    for name, expected in {"none": 2, "bf16": 1, "ddp/none": 2, "ddp/bf16": 1, "fake": 0.02}.items():
        assert expected * half < timed[name]["sent_bytes"] < 1.3 * expected * half + 50_000, name
    assert all(row["compute_s"] > 0 and row["step_s"] > 0 for row in timed.values())
    command("report", out / "results.jsonl", "--out", tmp_path / "report")
    assert "scalecom" in (tmp_path / "report/index.html").read_text()
