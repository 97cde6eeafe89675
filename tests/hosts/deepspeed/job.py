"""Start real `deepspeed` jobs on this machine."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).parent
SCRIPTS = HERE / "scripts"


def deepspeed(
    script: str,
    *arguments: str | Path,
    ranks: int = 2,
    folder: Path | None = None,
    environment: dict[str, str] | None = None,
    timeout: float = 280,
) -> subprocess.CompletedProcess[str]:
    """Run `scripts/<script>` in `folder` under the `deepspeed` launcher, on CPU; output and errors in `.stdout`."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    command = [
        str(Path(sys.executable).with_name("deepspeed")),
        *("--num_accelerators", str(ranks), "--master_port", str(port), "--no_local_rank"),
        str(SCRIPTS / script),
        *map(str, arguments),
    ]
    paths = [str(HERE / "site"), *filter(None, [os.environ.get("PYTHONPATH")])]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        command,
        env={**env, **(environment or {})},
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout,
    )


def run_cases(folder: Path, cases: dict[str, dict[str, Any]], **options: Any) -> dict[str, list[dict[str, Any]]]:
    """Train every case of `cases` in one job of `scripts/cases.py`; name -> what each rank reports, in rank order."""
    ranks = options.get("ranks", 2)
    (folder / "cases.json").write_text(json.dumps(cases))
    job = deepspeed("cases.py", folder, **options)
    assert job.returncode == 0, job.stdout[-20000:]
    reports = [torch.load(folder / f"report{rank}.pt", weights_only=True) for rank in range(ranks)]
    return {name: [report[name] for report in reports] for name in cases}
