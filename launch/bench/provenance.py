"""What a row must say so that its figures can be judged later: machine, versions, commit, file, date."""

from __future__ import annotations

import platform
import subprocess
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from launch.document import Machine

from .settings import ROOT, digest

_PACKAGES = ("compression-plugins", "torch", "horovod", "deepspeed", "numba", "numpy")


def provenance(file: Path) -> dict[str, Any]:
    """What every row of this run says of its origin: experiment (`file`, its YAML), machine, versions, commit."""
    machine = Machine.here()
    return {
        "experiment": file.stem,
        "file_digest": digest(file.read_text(encoding="utf-8")),
        "machine": {
            "processor": machine.processor,
            "cores": machine.cores,
            "memory_gib": machine.memory_gib,
            "system": machine.system,
        },
        "versions": {"python": platform.python_version(), **_versions()},
        **_commit(),
    }


def now() -> str:
    """The time in UTC, ISO 8601, to the second."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def _versions() -> dict[str, str]:
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _commit() -> dict[str, Any]:
    """Commit of the clone, and whether a tracked file differs from it; None where there is no git or no repository."""

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain", "-uno"))}
    except (OSError, subprocess.CalledProcessError):
        return {"commit": None, "dirty": None}
