"""Measures the cells that are not measured yet, one after the other, and appends a row for each."""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from compression_plugins.errors import CompressionError
from launch.lab.jobs import JobError
from launch.lab.netlab import NetLabError

from . import hosts, models, readings
from .cells import Cell
from .provenance import now
from .settings import Choice
from .store import Row, Store

#: Seconds that a cell is expected to take before one of its kind was measured.
_GUESS_S = {"speed": 15.0, "accuracy": 60.0, "quality": 5.0, "prediction": 30.0}
_ERROR_CHARACTERS = 2000
_EXCEPTION = re.compile(r"\b\w*(Error|Exception)\b: ")


@dataclass(frozen=True)
class Outcome:
    """What became of the cells: measured now, failed now, not begun because of the time limit."""

    measured: int
    failed: int
    left: int


def expected_s(cell: Cell, rows: Iterable[Row]) -> float:
    """Seconds that `cell` will take: median of finished ones as like it as there are, else a guess."""
    alike = [row for row in rows if row.get("kind") == cell.kind and "error" not in row and "wall_s" in row]
    for names in (("host", "model", "ranks", "rate"), ("model", "rate"), ("model",), ()):
        times = [row["wall_s"] for row in alike if all(row[name] == getattr(cell, name) for name in names)]
        if times:
            return float(median(times))
    return _GUESS_S[cell.kind]


class Runner:
    """Runs cells.

    Args:
        store: receives the rows.
        folder: of logs and of what the ranks record, one folder a cell.
        choices: the schemes by label.
        about: provenance, repeated in every row.
        limit_s: of one job.
        say: receives lines of progress.
    """

    def __init__(
        self,
        store: Store,
        folder: Path,
        choices: Mapping[str, Choice],
        about: Mapping[str, Any],
        limit_s: float,
        say: Callable[[str], None] = print,
    ) -> None:
        self.store, self.folder, self.choices = store, folder, choices
        self.about, self.limit_s, self.say = about, limit_s, say

    def run(self, cells: Sequence[Cell], limit_minutes: float | None = None) -> Outcome:
        """Measure what is not finished. A cell that fails leaves a row with its error, and the next one begins.

        Args:
            limit_minutes: no cell is begun that would probably end later than this.
        """
        begin = time.monotonic()
        todo = [cell for cell in cells if not self.store.finished(cell.key)]
        failed = 0
        for index, cell in enumerate(todo):
            expected = expected_s(cell, self.store.rows.values())
            if limit_minutes is not None and time.monotonic() - begin + expected > 60 * limit_minutes:
                return Outcome(index - failed, failed, len(todo) - index)
            row = self._measure(cell)
            self.store.append(row)
            failed += "error" in row
            rows = list(self.store.rows.values())
            rest = sum(expected_s(other, rows) for other in todo[index + 1 :])
            place = f"[{len(cells) - len(todo) + index + 1}/{len(cells)}]"
            self.say(f"{place} {cell}: {_headline(row)}; {_duration(rest)} left")
        return Outcome(len(todo) - failed, failed, 0)

    def _measure(self, cell: Cell) -> Row:
        folder = self.folder / cell.key
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        begin = time.monotonic()
        found: dict[str, Any]
        try:
            found = self._figures(cell, folder)
        except (JobError, NetLabError, CompressionError, ValueError, OSError) as error:
            found = {"error": _cause(folder / "log.txt") or f"{type(error).__name__}: {error}"[-_ERROR_CHARACTERS:]}
        head = {"key": cell.key, **cell.settings(), "date": now(), "wall_s": round(time.monotonic() - begin, 2)}
        return {**head, **found, "provenance": dict(self.about)}

    def _figures(self, cell: Cell, folder: Path) -> dict[str, Any]:
        if cell.kind == "quality":
            from . import quality

            return quality.measure(cell)
        with hosts.laboratory(cell.ranks, cell.rate) as lab:
            if cell.kind == "prediction":
                from . import predictions

                return predictions.ask(lab, cell, self.choices.values(), folder, self.limit_s)
            batch = models.load(cell.model, cell.compute_ms).batch
            job = hosts.start(lab, cell, self.choices[cell.scheme], folder, batch)
            try:
                job.wait(self.limit_s)
            finally:
                job.kill()
            return {**readings.read(folder, cell), "network": lab.description}


def _cause(log: Path) -> str | None:
    """The first line of a rank's output that names an exception; what launchers say after it is about themselves."""
    lines = log.read_text(errors="replace").splitlines() if log.exists() else []
    return next((line[-_ERROR_CHARACTERS:] for line in lines if _EXCEPTION.search(line)), None)


def _headline(row: Row) -> str:
    if "error" in row:
        return f"FAILED, {row['error'].splitlines()[-1][:160]}"
    if row["kind"] == "quality":
        return f"vNMSE {row['vnmse']:.3g}, ratio {row['ratio']:.3g}"
    if row["kind"] == "prediction":
        return f"{len(row['predictions'])} schemes judged, recommended: {row['recommended']}"
    metric = f", metric {row['metric']:.4g}" if "metric" in row else ""
    return f"{1e3 * row['step_s']:.0f} ms per step, {row['sent_bytes'] / 1e6:.3g} MB{metric}"


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"
