"""Asks `compression-plugins advise`, in the network and under the launcher of the runs that it predicts."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from compression_plugins.advise.choose import BASELINES
from launch.lab.jobs import Job, environment, free_port
from launch.results import read_records

from . import models
from .cells import Cell
from .hosts import Lab, torchrun
from .settings import REAL_MODELS, Choice


def ask(lab: Lab, cell: Cell, choices: Iterable[Choice], folder: Path, limit_s: float) -> dict[str, Any]:
    """What advise predicts and recommends.

    predictions: label -> seconds of a usual step, which is what a median over steps measures.
    eligible: labels of what it may recommend; recommended: of the scheme to use.

    Raises:
        JobError: advise failed.
        ValueError: it wrote nothing.
    """
    ours = [choice for choice in choices if not choice.peer]
    label_of = {choice.source or choice.label: choice.label for choice in ours}
    result = folder / "advice.jsonl"
    job = start(lab, cell, arguments(cell, ours, result), folder / "log.txt")
    try:
        job.wait(limit_s)
    finally:
        job.kill()
    records = read_records(result)
    if not records:
        raise ValueError(f"advise wrote nothing into {result}")
    known = {label_of[record["label"]]: record for record in records if record["label"] in label_of}
    return {
        "predictions": {label: record["usual_s"] for label, record in known.items() if "usual_s" in record},
        "eligible": [label for label, record in known.items() if record["eligible"] or label in BASELINES],
        "recommended": next((label for label, record in known.items() if record["recommended"]), None),
        "network": lab.description,
    }


def arguments(cell: Cell, ours: Iterable[Choice], result: Path) -> list[str]:
    """Words of the command `advise` for the cell's model, with the experiment's schemes as candidates."""
    found = ["advise", "--json", str(result)]  # its host framework is the launcher's
    if cell.model in REAL_MODELS:
        found += ["--model", f"launch.bench.models:{cell.model}", "--optimizer", models.optimizer(cell.model)]
    else:
        found += ["--shapes", cell.model, "--compute-ms", str(cell.compute_ms)]
    files = [choice.source for choice in ours if choice.source and choice.source != choice.label]
    found += [word for path in files for word in ("--config", str(path))]
    return [*found, "--schemes", *(choice.label for choice in ours if choice.source in (None, choice.label))]


def start(lab: Lab, cell: Cell, command: list[str], log: Path) -> Job:
    """The job: every rank runs the command, as a rank of the host's launcher."""
    if cell.host == "horovod":
        return lab.horovod([sys.executable, "-m", "compression_plugins", *command], (), environment(), log)
    if cell.host == "torchrun":
        return torchrun(lab, ["--module", "compression_plugins", *command], environment(), log)
    return lab.deepspeed(["--module", "compression_plugins", *command], free_port(), environment(), log)
