"""What the runs show: tables, a picture, and one line."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import inf
from statistics import mean, stdev
from typing import Any, NamedTuple

from launch.document import COLOURS, Table

from ..study import drawing, spread
from .methods import DENSE, METHODS, SETTINGS, Part
from .training import END, RISE, TRANSFER_RATE, TRANSFER_STEPS, TUNING_SEED, TUNING_WORKERS, Job, Run

#: (setting, method) -> learning rate.
Rates = dict[tuple[str, str], float]
#: How far below dense the picture reaches, in the unit of a task where less is better, and where more is.
_DEPTH = {-1: 0.3, 1: 6.0}


class Group(NamedTuple):
    """Runs that are compared with each other."""

    setting: str
    workers: int
    steps: int


@dataclass
class Results:
    """The runs of a plan, as far as they are done, and the rates that were chosen."""

    plan: Sequence[Part]
    runs: dict[Job, Run]
    rates: Rates = field(default_factory=dict)

    def groups(self) -> list[Group]:
        """Those of which there are runs, in the order of the plan."""
        every = [Group(p.setting, workers, steps) for p in self.plan for workers in p.workers for steps in p.steps]
        return [group for group in dict.fromkeys(every) if self.rows(group)]

    def rows(self, group: Group) -> dict[str, list[Run]]:
        """Method -> its runs at its rate, in the order of the methods' table and of seeds."""
        rows: dict[str, list[Run]] = {method: [] for method in METHODS}
        for job, run in sorted(self.runs.items(), key=lambda item: item[0].seed):
            rate = self.rates.get((job.setting, job.method))
            if Group(job.setting, job.workers, job.steps) == group and job.lr == rate and job.seed != TUNING_SEED:
                rows[job.method].append(run)
        return {method: runs for method, runs in rows.items() if runs}

    def tables(self) -> list[Table]:
        """One a group."""
        return [self._table(group) for group in self.groups()]

    def _table(self, group: Group) -> Table:
        setting, rows = SETTINGS[group.setting], self.rows(group)
        better = setting.task.better
        figures = [(f"held out, {setting.task.unit}", "value", better, 2 if better > 0 else 3)]
        figures.append(("training loss, bits", "loss", -1, 3))
        if setting.transfer is not None:
            figures.append(("after transfer, bits", "transfer", -1, 3))
        cells = []
        for method, runs in rows.items():
            cell = [method, f"{runs[0].job.lr:g}", f"{_less(runs):.3g}x", f"{_less(runs, 'after'):.3g}x"]
            for _, key, sense, places in figures:
                worse = [] if method == DENSE else behind(runs, rows.get(DENSE, []), key, sense)
                cell += [spread([getattr(run, key) for run in runs], places), spread(worse, places) if worse else ""]
            cells.append([*cell, str(len(runs))])
        title = f"{group.setting}, {group.workers} workers, {group.steps:,} steps"
        headers = [title, "lr", "less traffic", "after the warm-up"]
        for header, *_ in figures:
            headers += [header, "worse by"]
        return Table([*headers, "seeds"], cells)

    def picture(self) -> Any:
        """Held-out figure against bytes of the whole run: a panel a setting, a line a method, from its shortest runs to
        its longest; with the number of workers that the plan begins with.
        """
        workers = self.plan[0].workers[0]
        groups = [group for group in self.groups() if group.workers == workers]
        settings = list(dict.fromkeys(group.setting for group in groups))
        figure, panels = drawing(max(1, len(settings)), width=3 + 4 * len(settings), height=4.8)
        handles: dict[str, Any] = {}
        for panel, setting in zip(panels, settings):
            task = SETTINGS[setting].task
            rows = [self.rows(group) for group in sorted(groups) if group.setting == setting]
            for place, method in enumerate(METHODS):
                points = [_point(row[method]) for row in rows if method in row]
                points = [point for point in points if point is not None]
                if points:
                    look = {"color": COLOURS[place % len(COLOURS)], "marker": "os^D"[place // len(COLOURS) % 4]}
                    handles[method] = panel.errorbar(*zip(*points), linewidth=1, markersize=5, **look)
            dense = [_point(row[DENSE]) for row in rows if DENSE in row]
            values = [point[1] for point in dense if point is not None]
            if values:
                deep = _DEPTH[task.better]
                low, high = (deep, deep / 4) if task.better > 0 else (deep / 4, deep)
                panel.set_ylim(min(values) - low, max(values) + high)
            panel.set(title=setting, xlabel="MB sent by a rank in the whole run", xscale="log", ylabel=task.unit)
        names = [method for method in METHODS if method in handles]
        figure.legend([handles[name] for name in names], names, loc="outside right center", frameon=False, fontsize=8)
        return figure

    def notes(self) -> list[str]:
        names = list(dict.fromkeys(part.setting for part in self.plan))
        sizes = ", ".join(f"{name} {_weights(name):,} and {SETTINGS[name].batch}" for name in names)
        rates = "; ".join(f"{name} {', '.join(f'{lr:g}' for lr in SETTINGS[name].rates)}" for name in names)
        cold = [name for name, method in METHODS.items() if not method.warmup]
        return [
            f"Weights, and samples of a worker in a step: {sizes}. The learning rate rises over {RISE:.0%} of the "
            "steps and falls in a line to 0.",
            f"Learning rates: {rates}. Every method, dense too, takes the one with the lowest training loss, in runs "
            f"as long as the setting's shortest with {TUNING_WORKERS} workers and seed {TUNING_SEED}, which count for "
            "nothing else.",
            "Mean ± standard deviation over seeds. Worse by: than dense with the same seed, that is the same first "
            f"weights and batches. Training loss: mean of the last {END:.0%} of the steps.",
            "Less traffic: bytes of a dense ring all-reduce in fp32 in every step, over bytes that the transport "
            "counted, in the whole run with its dense warm-up, and after it. No warm-up: " + ", ".join(cold) + "; "
            f"{METHODS[DENSE].warmup:.0%} of the steps otherwise, frozen variances 15 %.",
            f"After transfer: held-out source code, after {TRANSFER_STEPS} dense steps on source code from the "
            f"trained weights, at {TRANSFER_RATE:g} times the lowest rate.",
            "What the picture leaves out is far below dense; the tables have it. A dash: a run diverged.",
        ]

    def headline(self) -> str:
        """Who sends least within so much of dense, in the longest runs that the first part of the plan has."""
        setting, workers = self.plan[0].setting, self.plan[0].workers[0]
        groups = [group for group in self.groups() if group[:2] == (setting, workers)]
        if not groups:
            return "no run of the first setting yet"
        rows = self.rows(max(groups))
        task, dense = SETTINGS[setting].task, rows.pop(DENSE, [])
        parts = []
        for limit in (0.01, 0.02, 0.05):
            near = {m: _less(runs) for m, runs in rows.items() if _worse(runs, dense, task.better) <= limit}
            if near:
                best = max(near, key=lambda method: near[method])
                parts.append(f"{near[best]:.0f}x within {limit:g} ({best})")
        found = ", ".join(parts) or "nobody within 0.05"
        return f"{setting}, {max(groups).steps:,} steps, less traffic and {task.unit} behind dense: {found}"


def behind(mine: Sequence[Run], dense: Sequence[Run], key: str, better: int) -> list[float | None]:
    """How much worse than dense with the same seed, where there is such a run; None where one has no figure."""
    others = {run.job.seed: getattr(run, key) for run in dense}
    pairs = [(getattr(run, key), others[run.job.seed]) for run in mine if run.job.seed in others]
    return [None if value is None or other is None else better * (other - value) for value, other in pairs]


def _worse(mine: Sequence[Run], dense: Sequence[Run], better: int) -> float:
    """The mean of it; infinite where that is not known."""
    found = behind(mine, dense, "value", better)
    known = [each for each in found if each is not None]
    return mean(known) if known and len(known) == len(found) else inf


def _less(runs: Sequence[Run], when: str = "whole") -> float:
    """How many times fewer bytes than dense."""
    return mean(run.less_after if when == "after" else run.less for run in runs)


def _point(runs: Sequence[Run]) -> tuple[float, float, float] | None:
    """(MB, figure, its spread)."""
    values = [run.value for run in runs if run.value is not None]
    if not values:
        return None
    return mean(run.sent for run in runs) / 1e6, mean(values), stdev(values) if len(values) > 1 else 0.0


def _weights(setting: str) -> int:
    return sum(p.numel() for p in SETTINGS[setting].task.model(0).parameters())
