"""What every experiment leaves behind: records, a picture, a table, a self-contained page, and a headline."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from launch.document import Machine, Table, page

#: What runs have measured, a line for each.
RECORDS = "runs.jsonl"


class Study:
    """One experiment while it runs.

    with Study("scalecom-volume", out, total=12) as study:
        study.record("n = 2, dense", n=2, scheme="none", bytes=...)   # one a run: a line of runs.jsonl and progress
        return study.finish(title, table, figure, notes, headline)

    Files in `out`: runs.jsonl, NAME.png, NAME.md, index.html. With `resume` runs.jsonl grows: `total` are the runs that
    `earlier` does not have.
    """

    def __init__(self, name: str, out: Path, total: int, resume: bool = False) -> None:
        self.name, self.out, self.total, self.done = name, out, total, 0
        self._mode = "a" if resume else "w"
        self.machine = str(Machine.here())

    def __enter__(self) -> Study:
        path = self.out / RECORDS
        cut = self._mode == "a" and path.exists() and not path.read_bytes().endswith(b"\n")
        self._records = path.open(self._mode, encoding="utf-8")
        if cut:  # what follows a line that was cut off begins a new one
            self._records.write("\n")
        self._progress("starts")
        return self

    def __exit__(self, *exc: object) -> None:
        self._records.close()

    def record(self, label: str, **fields: Any) -> None:
        """Keep what one run measured, and move the progress bar."""
        self._records.write(json.dumps(fields) + "\n")
        self._records.flush()
        self.done += 1
        self._progress(label)

    def finish(self, title: str, tables: Sequence[Table], figure: Any, notes: Sequence[str], headline: str) -> str:
        """Write picture, table and page; print the tables; return the headline."""
        figure.savefig(self.out / f"{self.name}.png", dpi=130)
        facts = {"Result": headline, "Machine": self.machine}
        (self.out / "index.html").write_text(page(title, facts, [figure], tables, notes), encoding="utf-8")
        parts = [f"![{title}]({self.name}.png)", *(table.markdown() for table in tables)]
        parts.append("\n".join(f"- {note}" for note in [*notes, f"Measured on {self.machine}."]))
        (self.out / f"{self.name}.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")
        for table in tables:
            print(table.text() + "\n")
        return headline

    def _progress(self, text: str) -> None:
        """One line on a terminal, one line a call elsewhere."""
        bar = "#" * (20 * self.done // max(1, self.total))
        end = "\n" if self.done == self.total or not sys.stderr.isatty() else ""
        print(f"\r[{bar:20s}] {self.done}/{self.total} {text:40s}", end=end, file=sys.stderr, flush=True)


def earlier(out: Path) -> list[dict[str, Any]]:
    """What earlier runs of an experiment have recorded in `out`, without a line that was cut off."""
    path = out / RECORDS
    found = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found


def spread(values: Sequence[float | None], places: int = 2) -> str:
    """Mean ± standard deviation over seeds; a dash if a run has no value."""
    known = [value for value in values if value is not None]
    if len(known) < len(values) or not known:
        return "–"
    return f"{mean(known):.{places}f}" + (f" ± {stdev(known):.{places}f}" if len(known) > 1 else "")


def drawing(columns: int = 1, width: float = 10, height: float = 4.2) -> tuple[Any, list[Any]]:
    """matplotlib figure and its axes, side by side, in the house's style."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = list(figure.subplots(1, columns, squeeze=False)[0])
    for each in axes:
        each.grid(alpha=0.25)
        each.spines[["top", "right"]].set_visible(False)
    return figure, axes
