"""The quick form of an experiment, as a person runs it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


def run_quick(name: str, out: Path) -> tuple[str, list[dict[str, Any]]]:
    """(last line printed, records of runs.jsonl)."""
    command = [sys.executable, "-m", "launch.reproduce", name, "--quick", "--out", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    assert (out / f"{name}.png").stat().st_size > 5000
    return done.stdout.splitlines()[-1], [json.loads(line) for line in (out / "runs.jsonl").read_text().splitlines()]
