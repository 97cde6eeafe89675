"""Watch a job while it runs: what its telemetry file says of bytes, ratio, exposed time and residuals.

compression-plugins watch run.jsonl            follows the file of COMPRESSION_PLUGINS_TELEMETRY=run.jsonl
compression-plugins watch run.jsonl --once     prints what is there, and ends

With `rich` installed the view is a table that stays in place; without it a line is printed now and then.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import ConfigError

_RECENT = 100
_POLL_S = 0.5


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Of the command."""
    parser.add_argument("file", type=Path, help="JSON lines that a job's telemetry writes")
    parser.add_argument("--once", action="store_true", help="print what is there, and end")


def run(options: argparse.Namespace) -> int:
    """The command itself; ends at Ctrl-C."""
    if not options.file.is_file():
        raise ConfigError(
            f"{options.file} is not there: start the job with COMPRESSION_PLUGINS_TELEMETRY={options.file}"
        )
    view = View()
    lines = follow(options.file, options.once)
    try:
        if options.once:
            for batch in lines:
                view.take(batch)
            print("\n".join(f"{name:>16}  {value}" for name, value in view.table()))
        elif importlib.util.find_spec("rich") is not None:
            _live(view, lines)
        else:
            for batch in lines:
                if batch:
                    view.take(batch)
                    print("  ".join(f"{name} {value}" for name, value in view.table()), flush=True)
    except KeyboardInterrupt:
        pass
    return 0


class View:
    """What a person wants to know of the lines so far."""

    def __init__(self) -> None:
        self._recent: deque[dict[str, Any]] = deque(maxlen=_RECENT)
        self._step, self._sent, self._skipped = 0, 0, 0
        self._norm: float | None = None
        self._cosine: float | None = None

    def take(self, batch: list[dict[str, Any]]) -> None:
        """More lines."""
        for line in batch:
            self._recent.append(line)
            self._step, self._sent = line["step"], self._sent + line["sent_bytes"]
            self._skipped += bool(line.get("skipped"))
            self._norm = line["residual_norm"] if line.get("residual_norm") is not None else self._norm
            self._cosine = line["cosine"] if line.get("cosine") is not None else self._cosine

    def table(self) -> list[tuple[str, str]]:
        """(name, value) in the order in which they are shown; means are over the last 100 steps."""
        recent = list(self._recent)
        if not recent:
            return [("step", "none yet")]
        count = len(recent)
        ratios = [line["ratio"] for line in recent if line.get("ratio")]
        inverse = sum(1 / ratio for ratio in ratios)

        def mean(name: str) -> float:
            return sum(line.get(name, 0.0) for line in recent) / count

        return [
            ("step", f"{self._step:,}"),
            ("sent", f"{mean('sent_bytes') / 1e6:.3f} MB per step, {self._sent / 1e9:.3f} GB in all"),
            ("ratio", f"{len(ratios) / inverse:.1f}x fewer bytes than dense" if ratios else "-"),
            ("exposed", f"{1e3 * mean('exposed_s'):.2f} ms per step"),
            ("encode, decode", f"{1e3 * mean('encode_s'):.2f} and {1e3 * mean('decode_s'):.2f} ms per step"),
            ("residual norm", "-" if self._norm is None else f"{self._norm:.4g}"),
            ("cosine", "-" if self._cosine is None else f"{self._cosine:.3f} of sent and dense gradient"),
            ("state", f"{recent[-1].get('state_bytes', 0) / 1e6:.1f} MB"),
            ("skipped steps", f"{self._skipped:,}"),
        ]


def follow(path: Path, once: bool = False) -> Iterator[list[dict[str, Any]]]:
    """The lines of a file, and then, again and again, those that were added meanwhile; `once`: those that are there.

    Raises:
        ConfigError: a line is none of a telemetry file.
    """
    with open(path, encoding="utf-8") as file:
        rest = ""
        while True:
            *whole, rest = (rest + file.read()).split("\n")
            yield [_parse(path, line) for line in whole if line.strip()]
            if once:
                return
            time.sleep(_POLL_S)


def _parse(path: Path, line: str) -> dict[str, Any]:
    try:
        found = json.loads(line)
        if isinstance(found, dict) and isinstance(found["step"], int) and isinstance(found["sent_bytes"], int):
            return found
    except (ValueError, KeyError):
        pass
    raise ConfigError(f"{path} is no file of telemetry: {line[:60]!r}")


def _live(view: View, lines: Iterator[list[dict[str, Any]]]) -> None:
    from rich.live import Live
    from rich.table import Table

    with Live(auto_refresh=False) as live:
        for batch in lines:
            view.take(batch)
            table = Table(show_header=False)
            for name, value in view.table():
                table.add_row(name, value)
            live.update(table, refresh=True)
