"""The commands of docs/benchmarks/bench.md, as a reader types them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from .isolation import counts_bytes

ROOT = Path(__file__).parents[2]

pytestmark = [pytest.mark.hosts, counts_bytes]


def command(*arguments: str | Path) -> str:
    """Its output; the same as `compression-plugins ...`."""
    words = [sys.executable, "-m", "compression_plugins", *map(str, arguments)]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


EXPERIMENT = """
hosts: [ddp]
schemes: []
models: [mlp]
ranks: [2]
rates: [unlimited]
steps: 4
warmup_steps: 1
"""


@pytest.mark.nightly
def test_a_bench_measures_its_cells_once_counts_their_bytes_and_reports(tmp_path: Path) -> None:
    file, out = tmp_path / "small.yaml", tmp_path / "out"
    file.write_text(EXPERIMENT)
    assert "2 cells measured, 0 failed, 0 left" in command("bench", file, "--out", out)
    assert "about 0 min to do" in command("bench", file, "--dry-run", "--out", out)
    rows = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    timed = {row["scheme"]: row for row in rows}
    assert set(timed) == {"ddp/none", "ddp/bf16"}, "the baselines of every experiment"
    half = 2 * timed["ddp/none"]["numel"]  # each of two ranks sends four bytes a value, or two
    assert 2 * half < timed["ddp/none"]["sent_bytes"] < 1.3 * 2 * half
    assert half < timed["ddp/bf16"]["sent_bytes"] < 1.3 * half
    assert all(row["compute_s"] > 0 and row["step_s"] > 0 for row in rows)
    with (out / "results.jsonl").open("a") as store:
        store.write(json.dumps({**rows[0], "key": "of the file before it was changed", "step_s": 9.0}) + "\n")
    command("bench", file, "--out", out)
    assert "<dd>2 speed</dd>" in (out / "index.html").read_text(), "only what the file says now is compared"
    command("report", out / "results.jsonl", "--out", tmp_path / "report")
    assert "<dd>3 speed</dd>" in (tmp_path / "report/index.html").read_text(), "a merged report holds all"
