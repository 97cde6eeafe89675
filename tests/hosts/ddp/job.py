"""Start real `torchrun` jobs on this machine, with the product's launcher or the stock one."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

SCRIPTS = Path(__file__).parent / "scripts"
OURS = ("-m", "compression_plugins", "torchrun")
STOCK = ("-m", "torch.distributed.run")


def torchrun(
    script: str,
    *arguments: str | Path,
    flags: Sequence[str] = (),
    ranks: int = 2,
    launcher: Sequence[str] = OURS,
    environment: dict[str, str] | None = None,
    status: int | None = 0,
    timeout: float = 280,
) -> str:
    """Run `scripts/<script>` on CPU; returns what all ranks printed.

    Args:
        flags: of the launcher.
        status: what the job must end with; None where failing is the point.
    """
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    where = ["--nproc-per-node", str(ranks), "--master-addr", "127.0.0.1", "--master-port", str(port)]
    command = [sys.executable, *launcher, *where, *flags, str(SCRIPTS / script), *map(str, arguments)]
    env = {k: v for k, v in os.environ.items() if not k.startswith("COMPRESSION_PLUGINS_")}
    env |= {"OMP_NUM_THREADS": "1", **(environment or {})}
    job = subprocess.run(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=timeout)
    if status is not None:
        assert job.returncode == status, job.stdout[-20000:]
    else:
        assert job.returncode, job.stdout[-20000:]
    return job.stdout


def run_cases(folder: Path, script: str, cases: dict[str, Any], ranks: int = 2) -> dict[str, list[Any]]:
    """Every case of `cases` in one job of `script`; name -> what each rank reports, in rank order.

    The job is configured by the environment variable, as under any launcher.
    """
    (folder / "cases.json").write_text(json.dumps(cases))
    torchrun(
        script,
        folder,
        ranks=ranks,
        launcher=STOCK,
        environment={"COMPRESSION_PLUGINS_CONFIG": '{"scheme": "bf16"}'},
    )
    reports = [torch.load(folder / f"report{rank}.pt", weights_only=True) for rank in range(ranks)]
    return {name: [report[name] for report in reports] for name in cases}


def result(output: str) -> dict[str, Any]:
    """The line of JSON that the clients' scripts print."""
    return json.loads(next(line for line in output.splitlines() if line.startswith("{")))
