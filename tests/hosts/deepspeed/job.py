"""Start real `deepspeed` jobs on this machine."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
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
    launcher: bool = True,
) -> subprocess.CompletedProcess[str]:
    """Run `scripts/<script>` in `folder` under the `deepspeed` launcher, on CPU; output and errors in `.stdout`.

    Args:
        launcher: False: ranks are started as the launcher starts them, without it, which takes seconds less.
    """
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    paths = [str(HERE / "site"), *filter(None, [os.environ.get("PYTHONPATH")])]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    env |= environment or {}
    program = [str(SCRIPTS / script), *map(str, arguments)]
    if launcher:
        deepspeed = str(Path(sys.executable).with_name("deepspeed"))
        options = ["--num_accelerators", str(ranks), "--master_port", str(port), "--no_local_rank"]
        return subprocess.run(
            [deepspeed, *options, *program],
            env=env, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=timeout,
        )  # fmt: skip
    return _together([sys.executable, "-u", *program], env, folder, ranks, port, timeout)


def _together(
    command: list[str], env: dict[str, str], folder: Path | None, ranks: int, port: int, timeout: float
) -> subprocess.CompletedProcess[str]:
    """Ranks with the launcher's variables; where one fails the others are ended, as the launcher does."""
    job = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(ranks), "CROSS_RANK": "0"}
    job |= {"CROSS_SIZE": "1", "LOCAL_SIZE": str(ranks)}
    with tempfile.TemporaryFile("w+") as output:
        processes = [
            subprocess.Popen(
                command,
                env={**env, **job, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                cwd=folder, stdout=output, stderr=subprocess.STDOUT,
            )
            for rank in range(ranks)
        ]  # fmt: skip
        ends = time.monotonic() + timeout
        try:
            while any(process.poll() is None for process in processes) and not any(p.poll() for p in processes):
                if time.monotonic() > ends:
                    raise subprocess.TimeoutExpired(command, timeout)
                time.sleep(0.05)
        finally:
            for process in processes:
                process.kill()
                process.wait()
        output.seek(0)
        status = next((process.returncode for process in processes if process.returncode), 0)
        return subprocess.CompletedProcess(command, status, output.read())


def run_cases(folder: Path, cases: dict[str, dict[str, Any]], **options: Any) -> dict[str, list[dict[str, Any]]]:
    """Train every case of `cases` in one job of `scripts/cases.py`; name -> what each rank reports, in rank order."""
    ranks = options.get("ranks", 2)
    (folder / "cases.json").write_text(json.dumps(cases))
    job = deepspeed("cases.py", folder, launcher=False, **options)
    assert job.returncode == 0, job.stdout[-20000:]
    reports = [torch.load(folder / f"report{rank}.pt", weights_only=True) for rank in range(ranks)]
    return {name: [report[name] for report in reports] for name in cases}
