"""Two hosts of two ranks behind shaped links: what crosses between them, and a step, on one level and on two.

The demonstration's perceptron under Horovod; each host is a network namespace. Needs root and iproute2. The quick form
has a small network, two methods and a few steps.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from compression_plugins.errors import CompressionError
from launch.document import Table
from launch.lab import netlab
from launch.lab.jobs import JobError, environment
from launch.lab.netlab import NetLab, NetLabError
from launch.results import read_run

from .study import Study, drawing

DESCRIPTION = "two hosts of two ranks: bytes between hosts and step time with and without `levels`"
HOSTS, NODE = 2, 2
RATES = {"100mbit": "100 Mb/s", "1gbit": "1 Gb/s"}
CODES: dict[str, list[str]] = {
    "qsgd, 4 bits": ["qsgd"],
    "ef_signsgd": ["ef_signsgd"],
    "scalecom": ["scalecom"],
}
COLOURS = ("#BBBBBB", "#0072B2")
_REPEATS, _LIMIT_S = 2, 200.0


def run(out: Path, quick: bool) -> str:
    """Run every code on every network on one level and on two; return the headline."""
    reason = netlab.available()
    if reason:
        raise CompressionError(f"levels needs a network laboratory, and here {reason}")
    names = ["scalecom"] if quick else list(CODES)
    rates, repeats = list(RATES)[1 if quick else 0 :], 1 if quick else _REPEATS
    cells = [("none", False), *((name, levels) for name in names for levels in (False, True))]
    found: dict[str, dict[tuple[str, bool], list[Mapping[str, float]]]] = {r: {c: [] for c in cells} for r in rates}
    with Study("levels", out, len(rates) * repeats * len(cells)) as study:
        for repeat in range(repeats):
            for rate in rates:
                for name, levels in cells:
                    row = _job(out, rate, name, levels, quick)
                    found[rate][name, levels].append(row)
                    label = f"{RATES[rate]}, {name}, {'two levels' if levels else 'one level'}"
                    study.record(label, rate=rate, code=name, levels=levels, repeat=repeat, **row)
        tables = [_table(rate, found[rate]) for rate in rates]
        title = "Two hosts of two ranks: one level and two"
        return study.finish(title, tables, _picture(found), _notes(repeats, quick), _headline(found))


def _job(out: Path, rate: str, name: str, levels: bool, quick: bool) -> dict[str, float]:
    """Seconds of a median step, and bytes that a host sends to the other in one."""
    folder = out / "ranks"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    flags = [] if name == "none" else ["--compression", *CODES[name]]
    flags += ["--compression-set", f"levels={NODE}"] if levels else []
    steps, width = (4, 128) if quick else (12, 2048)
    script = [sys.executable, "-m", "launch.train", "--steps", str(steps), "--width", str(width)]
    try:
        with NetLab(HOSTS, rate) as lab:
            script += ["--evaluate-every", str(steps), "--record", str(folder), "--interface", lab.interface]
            lab.horovod(script, flags, environment(), folder / "log.txt", ranks=NODE).wait(_LIMIT_S)
    except (NetLabError, JobError) as error:
        raise CompressionError(f"levels: {error}") from None
    result = read_run(folder, "horovod", name)
    return {"step_s": result.step_s, "compute_s": result.compute_s, "host_bytes": result.typical_bytes}


def _row(rows: Sequence[Mapping[str, float]], key: str, by: float) -> list[Any]:
    values = sorted(by * row[key] for row in rows)
    return [f"{median(values):.3g}", f"{values[0]:.3g} to {values[-1]:.3g}"]


def _table(rate: str, cells: Mapping[tuple[str, bool], Sequence[Mapping[str, float]]]) -> Table:
    headers = [RATES[rate], "levels", "MB from host to host per step", "lowest to highest", "ms per step", "from, to"]
    rows = [
        [name, str(NODE) if levels else "–", *_row(found, "host_bytes", 1e-6), *_row(found, "step_s", 1e3)]
        for (name, levels), found in cells.items()
    ]
    return Table(headers, rows)


def _notes(repeats: int, quick: bool) -> list[str]:
    return [
        f"{HOSTS} hosts of {NODE} ranks each, Horovod on Gloo, perceptron of {'0.1' if quick else '5.8'} M parameters; "
        f"none: stock Horovod. Medians over {repeats} jobs of the median step; jobs of one code follow each other.",
        "Bytes are read from the host's interface, headers included; what ranks of one host say to each other stays on "
        "its loopback and is not in them. All four ranks share the two cores of the machine, so computing and coding "
        "take twice the time that they would on machines of their own.",
    ]


def _picture(found: Mapping[str, Mapping[tuple[str, bool], Sequence[Mapping[str, float]]]]) -> Any:
    figure, axes = drawing(len(found), width=6.5 * len(found), height=4)
    for axis, (rate, cells) in zip(axes, found.items()):
        names = [name for name, levels in cells if levels]
        for shift, levels in ((-0.2, False), (0.2, True)):
            values = [1e3 * median(row["step_s"] for row in cells[name, levels]) for name in names]
            label = "two levels" if levels else "one level"
            axis.bar([i + shift for i in range(len(names))], values, 0.4, color=COLOURS[levels], label=label)
        axis.set_xticks(range(len(names)), names)
        axis.set(ylabel="ms per step", title=RATES[rate])
        axis.legend(frameon=False)
    return figure


def _headline(found: Mapping[str, Mapping[tuple[str, bool], Sequence[Mapping[str, float]]]]) -> str:
    parts = []
    for rate, cells in found.items():
        for name in (name for name, levels in cells if levels):
            one, two = (median(row["step_s"] for row in cells[name, levels]) for levels in (False, True))
            parts.append(f"{RATES[rate]} {name} {one / two:.2f}x")
    return f"a step on one level over one on two: {', '.join(parts)}"
