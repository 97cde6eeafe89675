"""Steps between flushes (K): accuracy, loss and traffic, with eta_s set at each flush and with one constant.

784-128-10 on Fashion-MNIST, 8 workers in one process; --quick: 40 steps on MNIST-5k, the constant untuned.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from launch.document import COLOURS, Table

from ..study import Study, drawing, spread
from .runs import GLOBAL_BATCH, NUMEL, Job, Run, best, bits_in_theory, train_all

DESCRIPTION = "Marsit: accuracy, loss and traffic against the steps between flushes (K), eta_s auto and constant"
WORKERS, LR = 8, 0.4
PSGD = "PSGD"
AUTO, CONSTANT = "auto", "constant"
#: Candidates for the constant eta_s; a quick run takes the second.
ETAS = (0.003, 0.01, 0.03, 0.1)
TUNING_SEED, TUNING_K = 100, 100
NEVER = 10**9


def run(out: Path, quick: bool) -> str:
    """Measure; write records, picture, table and page; return the headline."""
    intervals, seeds, steps = ((1, 10, NEVER), 1, 40) if quick else ((1, 10, 50, 100, 200, NEVER), 3, 400)
    base = Job("", {}, LR, WORKERS, TUNING_SEED, steps, quick=quick)
    tuning = [] if quick else [_marsit(base, CONSTANT, TUNING_K, eta) for eta in ETAS]
    with Study("marsit-k", out, len(tuning) + seeds * 2 * len(intervals)) as study:

        def trained(part: str, jobs: Sequence[Job]) -> list[Run]:
            runs = []
            for each in train_all(jobs, processes=1 if quick else None):
                runs.append(each)
                study.record(f"{part}: {_label(each.job)}, seed {each.job.seed}", part=part, **each.fields())
            return runs

        eta = best(trained("tuning", tuning)).job.config["eta_s"] if tuning else ETAS[1]
        jobs = [replace(base, method=PSGD, config={"scheme": "none"})]
        for interval in intervals:
            jobs.append(_marsit(base, AUTO, interval, "auto"))
            if interval > 1:  # at K = 1 nothing uses eta_s
                jobs.append(_marsit(base, CONSTANT, interval, eta))
        groups: dict[tuple[str, int], list[Run]] = {}
        for each in trained("sweep", [replace(job, seed=seed) for job in jobs for seed in range(seeds)]):
            groups.setdefault((each.job.method, _interval(each.job)), []).append(each)
        notes = _notes(base, seeds, eta)
        title = "Marsit against the steps between flushes"
        return study.finish(title, [_table(groups, steps)], _picture(groups, steps), notes, _headline(groups))


Groups = Mapping[tuple[str, int], Sequence[Run]]


def _marsit(base: Job, method: str, interval: int, eta: float | str) -> Job:
    return replace(base, method=method, config={"scheme": "marsit", "flush_steps": interval, "eta_s": eta})


def _interval(job: Job) -> int:
    return int(job.config.get("flush_steps", 0))


def _label(job: Job) -> str:
    return PSGD if job.method == PSGD else f"K = {_name(_interval(job))}, eta_s {job.config['eta_s']}"


def _name(interval: int) -> str:
    return "inf" if interval == NEVER else str(interval)


def _theory(interval: int, steps: int) -> float:
    """2(M-1)/M (1 + 31/K); the run's only flush, at step 0, counts where K is longer than the run."""
    return bits_in_theory(min(interval, steps), WORKERS)


def _behind(runs: Sequence[Run], dense: Sequence[Run]) -> list[float | None]:
    return [mine.accuracy - other.accuracy for mine, other in zip(runs, dense, strict=True)]


def _diverges(runs: Sequence[Run]) -> bool:
    return any(run.loss == float("inf") for run in runs)


def _table(groups: Groups, steps: int) -> Table:
    rows = []
    dense = groups[PSGD, 0]
    for (method, interval), runs in groups.items():
        losses = "diverges" if _diverges(runs) else spread([run.loss for run in runs], 3)
        points = "–" if method == PSGD else spread(_behind(runs, dense))
        name = ["–", PSGD] if method == PSGD else [_name(interval), "not used" if interval == 1 else method]
        theory = "–" if method == PSGD else f"{_theory(interval, steps):.3f}"
        bits = f"{mean(run.bits for run in runs):.3f}"
        rows.append([*name, spread([run.accuracy for run in runs]), points, losses, bits, theory])
    return Table(
        ["K", "eta_s", "accuracy, %", "against PSGD", "training loss", "bits an element", "in theory"], rows, left=2
    )


def _picture(groups: Groups, steps: int) -> Any:
    figure, (accuracy, loss) = drawing(columns=2, width=11)
    dense = groups[PSGD, 0]
    for axes, attribute in ((accuracy, "accuracy"), (loss, "loss")):
        axes.axhline(mean(getattr(run, attribute) for run in dense), color=COLOURS[0], linestyle=":", label="PSGD")
        for method, colour in ((AUTO, COLOURS[1]), (CONSTANT, COLOURS[2])):
            points = {
                k: [getattr(run, attribute) for run in runs]
                for (m, k), runs in groups.items()
                if m == method and not _diverges(runs)
            }
            x = [2 * steps if k == NEVER else k for k in points]
            bars = [stdev(each) if len(each) > 1 else 0.0 for each in points.values()]
            axes.errorbar(
                x, [mean(each) for each in points.values()], bars, fmt="o-", color=colour, label=f"eta_s {method}"
            )
        ticks = sorted({k for _, k in groups if k})
        axes.set(xlabel="steps between flushes, K", xscale="log")
        axes.set_xticks([2 * steps if k == NEVER else k for k in ticks], [_name(k) for k in ticks])
        axes.minorticks_off()
    accuracy.set(ylabel="test accuracy, %")
    loss.set(ylabel="training loss, last quarter")
    accuracy.legend(fontsize=8)
    return figure


def _notes(base: Job, seeds: int, eta: float) -> list[str]:
    data = "MNIST-5k" if base.quick else "Fashion-MNIST"
    candidates = ", ".join(f"{each:g}" for each in ETAS)
    chosen = f"of {candidates} the one with the lowest training loss at K = {TUNING_K} and seed {TUNING_SEED}"
    return [
        f"784-128-10 without biases ({NUMEL:,} weights) on {data}, {WORKERS} workers, {GLOBAL_BATCH} images a step of "
        f"all together, {base.steps} steps of SGD, learning rate {LR:g} with cosine decay; mean ± standard deviation "
        f"over {seeds} seed(s). Against PSGD: points, of the same seed.",
        f"Constant eta_s = {eta:g}, {'untuned' if base.quick else chosen}. It is in units of the gradient: the weights "
        "move by it times the learning rate. auto: each tensor's mean |p| at the last flush.",
        "diverges: at least one of the runs; the picture leaves them out. In theory: 2 (n - 1)/n (1 + 31/K). inf: "
        f"K is longer than the run; the flush of step 0 is its only one, and counts as K = {base.steps}.",
    ]


def _headline(groups: Groups) -> str:
    dense = groups[PSGD, 0]
    parts = []
    for (method, interval), runs in groups.items():
        if method == AUTO:
            points = mean(run.accuracy - other.accuracy for run, other in zip(runs, dense, strict=True))
            parts.append(f"K = {_name(interval)} {points:+.2f} at {mean(run.bits for run in runs):.2f} bits")
    accuracy = mean(run.accuracy for run in dense)
    return f"points against PSGD ({accuracy:.1f} %), eta_s auto: {'; '.join(parts)}"
