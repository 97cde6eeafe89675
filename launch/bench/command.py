"""Measure an experiment: schemes, hosts, models, numbers of ranks and link rates, each combination a real job.

compression-plugins bench launch/bench/quick.yaml
compression-plugins bench launch/bench/crossover.yaml --limit-minutes 30

Rows are appended to OUT/results.jsonl; what is measured already is not measured again, so the same command goes on
after an interruption. As root with iproute2 each rank is a host of its own on links of the given rate.
"""

from __future__ import annotations

import argparse
import signal
import threading
from pathlib import Path

from compression_plugins.errors import ConfigError

from .cells import Cell, cells
from .settings import UNLIMITED, load
from .store import Store, latest, read


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `compression-plugins bench`."""
    parser.add_argument("file", type=Path, metavar="FILE.yaml", help="the experiment; launch/bench has some")
    parser.add_argument("--out", type=Path, help="folder of results.jsonl and the report; default out/bench/NAME")
    parser.add_argument("--dry-run", action="store_true", help="list the cells and what is done, and stop")
    parser.add_argument("--limit-minutes", type=float, metavar="M", help="begin no cell that would end later than this")
    parser.add_argument("--publish", action="store_true", help="write the report's parts into their pages under docs")


def run(options: argparse.Namespace) -> int:
    """Returns the exit status: 0, 1 if a cell failed, 130 after an interruption. Raises `ConfigError`."""
    if options.limit_minutes is not None and not options.limit_minutes > 0:
        raise ConfigError(f"--limit-minutes {options.limit_minutes:g}: must be above 0")
    experiment, choices = load(options.file)
    wanted = cells(experiment, choices)
    if not wanted:
        raise ConfigError(f"{options.file} asks for nothing: give rates, accuracy or quality")
    out = options.out or Path("out/bench") / options.file.stem
    if options.dry_run:
        _list(wanted, out / "results.jsonl")
        return 0
    _check_network(wanted)
    from .provenance import provenance
    from .report import write
    from .runner import Runner

    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends jobs and network as Ctrl-C does
    with Store(out / "results.jsonl") as store:
        if store.dropped:
            print(f"{store.path}: a half-written last line was dropped; its cell is measured again")
        done = sum(store.finished(cell.key) for cell in wanted)
        print(f"{len(wanted)} cells, {done} of them done; rows go to {store.path}", flush=True)
        by_label = {choice.label: choice for choice in choices}
        say = lambda line: print(line, flush=True)  # noqa: E731
        runner = Runner(store, out.resolve() / "runs", by_label, provenance(options.file), experiment.limit_s, say)
        try:
            outcome = runner.run(wanted, options.limit_minutes)
        except KeyboardInterrupt:
            print("interrupted: job ended, network removed; the same command goes on from here")
            return 130
    print(f"{outcome.measured} cells measured, {outcome.failed} failed, {outcome.left} left")
    keys = {cell.key for cell in wanted}
    if not any(store.finished(key) for key in keys):
        return 1
    whole = not (outcome.failed or outcome.left)
    path = write([out / "results.jsonl"], out, options.publish and whole, keys=keys)
    print(f"report: {path}")
    if options.publish and not whole:
        print("nothing was published: that needs every cell; the same command goes on from here")
    return 1 if outcome.failed else 0


def _check_network(wanted: list[Cell]) -> None:
    """Raises `ConfigError` before anything runs, where limited rates cannot be had."""
    from launch.lab.netlab import available

    limited = sorted({cell.rate for cell in wanted if cell.kind != "quality" and cell.rate != UNLIMITED})
    if limited and (reason := available()):
        raise ConfigError(
            f"links of {', '.join(limited)} cannot be emulated here: {reason}; or use rates: [{UNLIMITED}]"
        )


def _list(wanted: list[Cell], path: Path) -> None:
    from .runner import expected_s

    rows = latest(read(path)) if path.exists() else {}
    left = 0.0
    for cell in wanted:
        row = rows.get(cell.key)
        state = "to do" if row is None else "failed" if "error" in row else "done"
        left += 0 if state == "done" else expected_s(cell, rows.values())
        print(f"{state:6s} {cell.key}  {cell}")
    print(f"{len(wanted)} cells; about {left / 60:.0f} min to do")
