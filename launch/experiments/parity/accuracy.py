"""Accuracy against traffic of many methods, beside dense training with the same seed, length and rates to choose from.

Runs are kept: an experiment that was stopped goes on where it was, and `--only` trains a part. Tables hold what is
there.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from math import inf
from pathlib import Path

from compression_plugins.errors import CompressionError, nearest

from ..study import Study, earlier
from .methods import PLAN, QUICK, SETTINGS, Part
from .report import Rates, Results
from .training import TUNING_SEED, TUNING_WORKERS, Job, Run, train_all

DESCRIPTION = "which settings reach dense accuracy under Adam: few bits, one bit, sparse, local steps; 4 workers"
NAME = "parity"
#: What `--only` may name.
KEYS = ("setting", "method", "steps", "seed", "workers")


def run(out: Path, quick: bool, only: Mapping[str, Collection[str]] | None = None) -> str:
    plan = QUICK if quick else PLAN
    wanted = _part_of(jobs(plan), only or {})
    results = Results(plan, recorded(out), _middle_rates(plan) if quick else {})
    trials = [] if quick else [job for each in tuning_jobs(plan, wanted).values() for job in each]
    if not quick:
        results.rates |= chosen(plan, results.runs)
    left = [job for job in trials if job not in results.runs]
    undone = [job for job in wanted if with_rate(job, results.rates) not in results.runs]
    with Study(NAME, out, len(left) + len(undone), resume=True) as study:

        def train(todo: Sequence[Job]) -> None:
            for each in train_all(todo, 1 if quick else None) if todo else ():
                results.runs[each.job] = each
                study.record(str(each.job), **each.record())

        train(left)
        if not quick:
            results.rates |= chosen(plan, results.runs)
        train([with_rate(job, results.rates) for job in undone])
        title = "Accuracy beside dense training"
        return study.finish(title, results.tables(), results.picture(), results.notes(), results.headline())


def jobs(plan: Sequence[Part]) -> list[Job]:
    """All of a plan, without their learning rates."""
    found = [
        Job(part.setting, method, steps, seed, workers)
        for part in plan
        for steps in part.steps
        for workers in part.workers
        for seed in part.seeds
        for method in part.methods
    ]
    return list(dict.fromkeys(found))


def tuning_jobs(plan: Sequence[Part], wanted: Iterable[Job]) -> dict[tuple[str, str], list[Job]]:
    """(setting, method) of `wanted` -> its trials, one a learning rate, as long as the setting's shortest runs."""
    found: dict[tuple[str, str], list[Job]] = {}
    for job in wanted:
        steps = min(steps for part in plan if part.setting == job.setting for steps in part.steps)
        found[job.setting, job.method] = [
            Job(job.setting, job.method, steps, TUNING_SEED, TUNING_WORKERS, lr) for lr in SETTINGS[job.setting].rates
        ]
    return found


def chosen(plan: Sequence[Part], runs: Mapping[Job, Run]) -> Rates:
    """The rates with the lowest training loss, of methods all of whose trials are done."""
    return {
        key: min(trials, key=lambda job: _or_inf(runs[job].loss)).lr
        for key, trials in tuning_jobs(plan, jobs(plan)).items()
        if all(job in runs for job in trials)
    }


def recorded(out: Path) -> dict[Job, Run]:
    """Runs of earlier times, of methods that are still what they were."""
    runs = [Run.from_record(record) for record in earlier(out)]
    return {each.job: each for each in runs if each is not None}


def with_rate(job: Job, rates: Rates) -> Job:
    """The job at its method's rate; as it is, where that is not known yet."""
    return replace(job, lr=rates.get((job.setting, job.method), job.lr))


def _middle_rates(plan: Sequence[Part]) -> Rates:
    keys = {(job.setting, job.method) for job in jobs(plan)}
    return {(setting, method): sorted(SETTINGS[setting].rates)[1] for setting, method in keys}


def _part_of(every: Sequence[Job], only: Mapping[str, Collection[str]]) -> list[Job]:
    for key, words in only.items():
        if key not in KEYS:
            raise CompressionError(f"--only {key}: unknown key{nearest(key, KEYS)}; valid: {', '.join(KEYS)}")
        known = list(dict.fromkeys(str(getattr(job, key)) for job in every))
        for word in words:
            if word not in known:
                raise CompressionError(f"--only {key}={word}: there is none{nearest(word, known)}: {', '.join(known)}")
    return [job for job in every if all(str(getattr(job, key)) in words for key, words in only.items())]


def _or_inf(loss: float | None) -> float:
    return inf if loss is None else loss
