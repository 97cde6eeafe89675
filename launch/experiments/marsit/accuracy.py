"""Accuracy, traffic and time to target of Marsit beside PSGD and the other sign methods.

Accuracy: workers in one process, Fashion-MNIST. Time: `horovodrun` in network namespaces at 1 Gb/s, MNIST-5k; without
root that half is left out, and table and headline say so. --quick: MNIST-5k for both, few steps, untuned.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from launch.document import COLOURS, Table
from launch.results import Result

from ..study import Study, drawing, spread
from . import netlab as lab
from .runs import GLOBAL_BATCH, MOMENTUM, NUMEL, Job, Run, best, bits_in_theory, train_all

DESCRIPTION = "Marsit: accuracy and traffic for 8 to 32 workers, time to target at 1 Gb/s, beside PSGD and sign methods"
PSGD, RING, TORUS, CASCADE = "PSGD", "Marsit, ring", "Marsit, torus", "cascading_ssdm"
METHODS: dict[str, dict[str, Any]] = {
    PSGD: {"scheme": "none"},
    RING: {"scheme": "marsit", "form": "ring"},
    TORUS: {"scheme": "marsit", "form": "torus"},
    "signsgd": {"scheme": "signsgd"},
    "ef_signsgd": {"scheme": "ef_signsgd", "stages": 1},
    "ssdm": {"scheme": "ssdm"},
    CASCADE: {"scheme": "cascading_ssdm"},
}
#: What tuning chooses among; a quick run takes the first. The torus takes the ring's: its bits follow the same law.
RATES: dict[str, tuple[float, ...]] = {
    PSGD: (0.2, 0.4, 0.8),
    RING: (0.2, 0.4, 0.8),
    "ef_signsgd": (0.2, 0.4, 0.8, 1.6),
    "signsgd": (3e-4, 1e-3, 3e-3),
    "ssdm": (1e-3, 3e-3, 1e-2),
    CASCADE: (1e-5, 1e-4),
}
#: Optimizer -> its learning rate, for PSGD after the average and for Marsit before it.
DIRECTIONS = {"momentum": 0.01, "adam": 3e-4}
#: Steps of the runs with an optimizer that has a memory of its own.
LONG = 600
TUNING_SEED = 100


def run(out: Path, quick: bool) -> str:
    """Measure; write records, picture, table and page; return the headline."""
    missing = lab.missing()
    if missing:
        print(f"TIME TO TARGET IS NOT MEASURED: {missing}")
    settings, names = (lab.QUICK, lab.QUICK_METHODS) if quick else (lab.FULL, lab.FULL_METHODS)
    if missing:
        names = {}
    base = Job("", {}, 0.0, workers=8, seed=TUNING_SEED, steps=40 if quick else 200, quick=quick)
    workers, seeds, flush = ((4, 8), 1, 20) if quick else ((8, 16, 32), 3, 100)
    tuning = [] if quick else _tuning(base, flush)
    directions = [] if quick else _directions(replace(base, steps=LONG), seeds, flush)
    total = sum(map(len, names.values())) + len(tuning) + len(METHODS) * len(workers) * seeds + len(directions)
    with Study("marsit-accuracy", out, total) as study:
        found: dict[int, dict[str, Result]] = {}
        for size in names:
            found[size] = {}
            for name, result in lab.measure(out, size, settings, names[size]):
                found[size][name] = result
                reached = result.reached(settings.target)
                fields = {"part": "netlab", "n": size, "target": settings.target, "reached_s": reached}
                study.record(f"horovodrun, {size} ranks: {name}", **{**result.to_dict(), **fields, "method": name})

        def trained(part: str, jobs: Sequence[Job]) -> list[Run]:
            runs = []
            for each in train_all(jobs, processes=1 if quick else None):
                runs.append(each)
                job = each.job
                label = f"{part}: {job.method}, n = {job.workers}, lr {job.lr:g}, seed {job.seed}"
                study.record(label, part=part, **each.fields())
            return runs

        rates = _chosen(trained("tuning", tuning)) if tuning else {name: rates[0] for name, rates in RATES.items()}
        rates[TORUS] = rates[RING]
        jobs = [
            replace(base, method=name, config=_config(name, flush), lr=rates[name], workers=size, seed=seed)
            for size in sorted(workers, reverse=True)  # the long ones first: no core waits at the end
            for name in METHODS
            for seed in range(seeds)
        ]
        runs = _grouped(trained("local", jobs))
        tables = [_accuracy_table(runs, workers, flush)]
        if directions:
            tables.append(_directions_table(trained("directions", directions)))
        tables.append(lab.table(found, settings.target, missing))
        notes = [*_notes(base, seeds, flush), *lab.notes(settings, missing)]
        title = "Marsit beside PSGD and other sign methods"
        figure = _picture(runs, workers, found, settings.target, missing)
        return study.finish(title, tables, figure, notes, _headline(runs, workers, found, settings.target, missing))


Groups = Mapping[tuple[str, int], Sequence[Run]]


def _config(name: str, flush: int) -> dict[str, Any]:
    config = METHODS[name]
    return {**config, "flush_steps": flush} if config["scheme"] == "marsit" else config


def _tuning(base: Job, flush: int) -> list[Job]:
    return [
        replace(base, method=name, config=_config(name, flush), lr=lr) for name, rates in RATES.items() for lr in rates
    ]


def _chosen(runs: Sequence[Run]) -> dict[str, float]:
    """Every method's rate with the lowest training loss."""
    return {name: best([run for run in runs if run.job.method == name]).job.lr for name in RATES}


def _directions(base: Job, seeds: int, flush: int) -> list[Job]:
    """PSGD with each optimizer, and Marsit with the optimizer before the compression and plain SGD behind it."""
    jobs = []
    for direction, lr in DIRECTIONS.items():
        marsit = {"scheme": "marsit", "direction": direction, "flush_steps": flush}
        for seed in range(seeds):
            jobs.append(replace(base, method=PSGD, config=METHODS[PSGD], lr=lr, seed=seed, optimizer=direction))
            jobs.append(replace(base, method=f"Marsit, {direction}", config=marsit, lr=lr, seed=seed))
    return jobs


def _grouped(runs: Sequence[Run]) -> Groups:
    """(method, workers) -> its runs, in order of seeds."""
    groups: dict[tuple[str, int], list[Run]] = {}
    for each in runs:
        groups.setdefault((each.job.method, each.job.workers), []).append(each)
    return groups


def _behind(runs: Sequence[Run], dense: Sequence[Run]) -> list[float | None]:
    """Accuracy less that of PSGD with the same seed, points."""
    return [mine.accuracy - other.accuracy for mine, other in zip(runs, dense, strict=True)]


def _ends(runs: Sequence[Run], dense: Sequence[Run]) -> list[str]:
    """Cells: accuracy, points against PSGD, training loss."""
    losses = "diverges" if any(run.loss == float("inf") for run in runs) else spread([run.loss for run in runs], 3)
    points = "–" if runs is dense else spread(_behind(runs, dense))
    return [spread([run.accuracy for run in runs]), points, losses]


def _accuracy_table(runs: Groups, workers: Sequence[int], flush: int) -> Table:
    rows = []
    for size in workers:
        for name in METHODS:
            group = runs[name, size]
            theory = f"{bits_in_theory(flush, size):.3f}" if METHODS[name]["scheme"] == "marsit" else "–"
            bits = f"{mean(run.bits for run in group):.3f}"
            rows.append([str(size), name, f"{group[0].job.lr:g}", *_ends(group, runs[PSGD, size]), bits, theory])
    headers = ["n", "method", "lr", "accuracy, %", "against PSGD", "training loss", "bits an element", "in theory"]
    return Table(headers, rows, left=2)


def _directions_table(runs: Sequence[Run]) -> Table:
    rows = []
    for direction, lr in DIRECTIONS.items():
        dense = [run for run in runs if run.job.optimizer == direction]
        marsit = [run for run in runs if run.job.method == f"Marsit, {direction}"]
        for name, group in ((PSGD, dense), ("Marsit, one_hot", marsit)):
            bits = f"{mean(run.bits for run in group):.3f}"
            rows.append([direction, name, f"{lr:g}", *_ends(group, dense), bits])
    return Table(
        ["optimizer", "method", "lr", "accuracy, %", "against PSGD", "training loss", "bits an element"], rows, left=2
    )


def _picture(
    runs: Groups, workers: Sequence[int], found: Mapping[int, dict[str, Result]], target: float, missing: str | None
) -> Any:
    figure, (accuracy, bits, *clocks) = drawing(columns=2 + max(1, len(found)), width=16 if len(found) > 1 else 13)
    shift = 1.025
    for place, (name, colour) in enumerate(zip(METHODS, COLOURS)):
        groups = [runs[name, size] for size in workers]
        values = [[run.accuracy for run in group] for group in groups]
        x = [size * shift ** (place - 3) for size in workers]
        bars = [stdev(each) if len(each) > 1 else 0.0 for each in values]
        accuracy.errorbar(x, [mean(each) for each in values], bars, fmt="o", color=colour, markersize=4)
        bits.plot(
            x, [mean(run.bits for run in group) for group in groups], "o-", color=colour, label=name, markersize=4
        )
    dense = mean(run.accuracy for size in workers for run in runs[PSGD, size])
    accuracy.axhline(dense, color=COLOURS[0], linewidth=0.8, linestyle=":")
    accuracy.set(ylabel="test accuracy, % (both SSDM are below)", ylim=(dense - 6, dense + 3))
    bits.set(ylabel="bits sent a step and element", yscale="log")
    bits.set_yticks([2, 4, 8, 16, 32, 64], ["2", "4", "8", "16", "32", "64"])
    bits.tick_params(axis="y", which="minor", left=False, labelleft=False)
    for axes in (accuracy, bits):
        axes.set(xlabel="workers", xscale="log")
        axes.set_xticks(workers, [str(size) for size in workers])
        axes.tick_params(axis="x", which="minor", bottom=False, labelbottom=False)
    bits.legend(fontsize=7)
    for axes, (ranks, results) in zip(clocks, found.items()):
        lab.draw(axes, results, ranks, target)
    if missing:
        clocks[0].text(0.5, 0.5, f"time: not measured\n({missing})", ha="center", wrap=True)
    return figure


def _notes(base: Job, seeds: int, flush: int) -> list[str]:
    data = "MNIST-5k" if base.quick else "Fashion-MNIST"
    tuned = (
        "not tuned in this quick form"
        if base.quick
        else f"the one with the lowest training loss at n = 8 and seed {TUNING_SEED}, of "
        + "; ".join(f"{name} {', '.join(f'{lr:g}' for lr in rates)}" for name, rates in RATES.items())
    )
    notes = [
        f"Accuracy: 784-128-10 without biases ({NUMEL:,} weights) on {data}, one global batch of {GLOBAL_BATCH} images "
        f"split over n workers in one process, {base.steps} steps of SGD with cosine decay, K = {flush}, eta_s auto; "
        f"mean ± standard deviation over {seeds} seed(s). Against PSGD: points, of the same seed. Learning rates: "
        f"{tuned}; the torus takes the ring's.",
        "Bits: sent by a worker, flushes and flags included. In theory: 2 (n - 1)/n (1 + 31/K). Cascading SSDM stops "
        "where it diverges, within a few steps at any rate, and its bits are those of its steps.",
    ]
    if not base.quick:
        rates = ", ".join(f"{name} {lr:g}" for name, lr in DIRECTIONS.items())
        notes.append(
            f"Optimizers: 8 workers, {LONG} steps, untuned rates ({rates}); momentum {MOMENTUM:g}. PSGD has the "
            "optimizer after the average, Marsit before the compression (`direction`)."
        )
    return notes


def _headline(
    runs: Groups, workers: Sequence[int], found: Mapping[int, dict[str, Result]], target: float, missing: str | None
) -> str:
    worst = min(
        ((mean(point for point in _behind(runs[name, size], runs[PSGD, size]) if point is not None)), name, size)
        for name in (RING, TORUS)
        for size in workers
    )
    bits = mean(run.bits for run in runs[RING, 8])
    text = f"Marsit against PSGD: worst mean {worst[0]:+.2f} points ({worst[1]}, n = {worst[2]}), "
    text += f"{bits:.2f} bits an element at n = 8"
    if missing:
        return f"{text}; time to target not measured: {missing}"
    parts = [f"n = {ranks}: {lab.less(lab.saving(results, 'marsit', target))}" for ranks, results in found.items()]
    return f"{text}; time to {100 * target:g} % at 1 Gb/s against dense, {', '.join(parts)}"
