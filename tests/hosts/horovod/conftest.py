"""Real `horovodrun` jobs. A start costs seconds: a script makes many checks and prints a `RESULT {json}` a rank."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

SCRIPTS = Path(__file__).parent / "scripts"
_RANK_LINE = re.compile(r"^\[(\d+)\]<(stdout|stderr)>:(.*)$")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = str(Path(__file__).parent)
    missing = importlib.util.find_spec("horovod") is None
    for item in items:
        if str(item.path).startswith(here):
            item.add_marker(pytest.mark.hosts)
            if missing:
                item.add_marker(pytest.mark.skip(reason="Horovod is not installed"))


@dataclass
class Job:
    """A job that has ended: exit status, seconds, everything it printed, and the results of its ranks in rank order."""

    status: int
    seconds: float
    output: str
    results: list[dict[str, Any]]


def start(command: Sequence[str], timeout: float = 150, **environment: str) -> Job:
    """Run a command in a process group of its own, which does not outlive `timeout` seconds."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    env = {k: v for k, v in env.items() if k != "COMPRESSION_PLUGINS_CONFIG" or k in environment}
    began = time.monotonic()
    process = subprocess.Popen(
        command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    try:
        output, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        pytest.fail(f"{' '.join(command)}: still running after {timeout} s\n{output[-6000:]}")
    results = []
    for line in output.splitlines():
        match = _RANK_LINE.match(line)
        text = match[3] if match else line
        if text.startswith("RESULT "):
            results.append(json.loads(text.removeprefix("RESULT ")))
    return Job(process.returncode, time.monotonic() - began, output, sorted(results, key=lambda r: r["rank"]))


@pytest.fixture(scope="session")
def horovodrun() -> Callable[..., Job]:
    """`horovodrun(*flags, script=, arguments=, np=, status=)`: the stock command, on a script of `scripts/`."""
    stock = [str(Path(sys.executable).with_name("horovodrun"))]

    def run(
        *flags: str,
        script: str = "train.py",
        arguments: Sequence[str] = (),
        np: int = 2,
        launcher: Sequence[str] = stock,
        status: int | None = 0,
        timeout: float = 150,
        **environment: str,
    ) -> Job:
        if "--min-np" not in flags:  # which means Gloo anyway
            flags = ("--gloo", *flags)  # else Horovod imports itself once more, in seconds, to look for MPI
        command = [*launcher, *flags, "-np", str(np), sys.executable, str(SCRIPTS / script), *arguments]
        job = start(command, timeout, **environment)
        if status is not None:
            assert job.status == status, job.output[-8000:]
        return job

    return run
