"""ScaleCom against dense training at 50 to 400 times less traffic: a CNN, an LSTM and a transformer, four workers.

As in the paper the hyper-parameters are those of dense training, the first steps are sent dense, and so is the first
convolution. Everything else is compressed, biases, norms and embeddings too: in networks this small they would be most
of what is left to send. `--quick` trains the CNN on MNIST-5k and the LSTM, for fewer steps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any, NamedTuple

import torch

from compression_plugins.config import Config
from launch.document import COLOURS, Table

from ..simulated import Cluster
from ..study import Study, drawing, spread
from ..tasks import DIGITS_CNN, FASHION_CNN, LSTM, TRANSFORMER, Task

DESCRIPTION = "accuracy against dense at 50 to 400 times: CNN, LSTM and transformer, four workers"
NAME = "scalecom-accuracy"
WORKERS = 4
#: Share of the steps that are sent dense; the learning rate rises as long, and then falls in a line to 0.
WARMUP = 0.05


class Case(NamedTuple):
    """A task, how long it trains, and the tensors that travel as they are."""

    task: Task
    steps: int
    dense: tuple[str, ...] = ()


class Method(NamedTuple):
    """ScaleCom's parameters; a ratio of 1 stands for dense."""

    ratio: int
    beta: float = 1.0

    def __str__(self) -> str:
        return "dense" if self.ratio == 1 else f"1 in {self.ratio}, β = {self.beta:g}"


DENSE = Method(1)
FIRST_CONVOLUTION = ("1.*",)
CASES = (Case(FASHION_CNN, 800, FIRST_CONVOLUTION), Case(LSTM, 800), Case(TRANSFORMER, 600))
METHODS = (DENSE, Method(50, 0.1), Method(100, 0.1), Method(400, 0.1), Method(100))
QUICK_CASES = (Case(DIGITS_CNN, 150, FIRST_CONVOLUTION), Case(LSTM, 250))
QUICK_METHODS = (DENSE, Method(50, 0.1))


@dataclass
class Run:
    """One training.

    Attributes:
        value: figure of merit at the end, in the task's unit.
        loss: mean training loss of each fiftieth of the run, in nats.
        step_bytes: that a rank sends in a compressed step.
        dense_bytes: in a dense step.
        bytes: in the whole run.
    """

    task: str
    ratio: int
    beta: float
    seed: int
    steps: int
    value: float
    loss: list[float]
    step_bytes: float
    dense_bytes: float
    bytes: float


def run(out: Path, quick: bool) -> str:
    cases, methods, seeds = (QUICK_CASES, QUICK_METHODS, 1) if quick else (CASES, METHODS, 3)
    jobs = [(case, method, seed) for case in cases for method in methods for seed in range(seeds)]
    runs: dict[tuple[str, Method], list[Run]] = {}
    with Study(NAME, out, total=len(jobs)) as study:
        for case, method, seed in jobs:
            done = train(case, method, seed)
            runs.setdefault((case.task.name, method), []).append(done)
            study.record(f"{case.task.name}, {method}, seed {seed}", **asdict(done))
        return study.finish(
            f"Accuracy with ScaleCom, {WORKERS} workers",
            [_table(cases, methods, runs)],
            _picture(cases, methods, runs),
            [
                f"{seeds} seed(s), mean ± standard deviation. Worse than dense by: with the same seed, that is the "
                "same first weights and batches. Within the spread: at most two standard deviations of dense training.",
                "Less traffic: bytes that the transport counted, dense over compressed; a step, and over the whole run "
                f"with its dense {WARMUP:.0%}.",
            ],
            _headline(cases, methods, runs),
        )


def train(case: Case, method: Method, seed: int) -> Run:
    """One run of four simulated workers."""
    task, steps = case.task, case.steps
    warmup = max(1, int(WARMUP * steps))
    document: dict[str, Any] = {"scheme": "none"}
    if method.ratio > 1:
        rules: list[dict[str, Any]] = [{"match": pattern, "scheme": "none"} for pattern in case.dense]
        rules.append({"match": "*"})  # biases and norms too
        document = {"scheme": "scalecom", **method._asdict(), "warmup_steps": warmup, "rules": rules}
    model = task.model(seed)
    optimizer = task.optimizer(model.parameters())
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda t: min((t + 1) / warmup, (steps - t) / (steps - warmup))
    )
    cluster = Cluster(model, optimizer, Config.load(document), WORKERS)
    batches = [task.batches(rank, WORKERS, seed) for rank in range(WORKERS)]
    losses, sent = [], [0.0]
    for _ in range(steps):
        losses.append(cluster.step(lambda model, rank: task.loss(model, next(batches[rank]))))
        sent.append(cluster.sent[0])
        schedule.step()
    part = max(1, steps // 50)
    return Run(
        task.name,
        method.ratio,
        method.beta,
        seed,
        steps,
        task.evaluate(model),
        [mean(losses[i : i + part]) for i in range(0, steps, part)],
        (sent[-1] - sent[warmup]) / (steps - warmup),
        sent[1],
        sent[-1],
    )


Runs = Mapping[tuple[str, Method], Sequence[Run]]


def _worse(case: Case, method: Method, runs: Runs) -> list[float]:
    """How much worse than dense with the same seed, in the task's unit; negative where better."""
    pairs = zip(runs[case.task.name, DENSE], runs[case.task.name, method])
    return [case.task.better * (dense.value - each.value) for dense, each in pairs]


def _table(cases: Sequence[Case], methods: Sequence[Method], runs: Runs) -> Table:
    headers = [
        "task",
        "kept",
        "steps",
        "result",
        "worse than dense by",
        "within the spread",
        "less traffic",
        "whole run",
    ]
    rows = []
    for case in cases:
        places = 2 if case.task.better > 0 else 3
        dense = runs[case.task.name, DENSE]
        for method in methods:
            each = runs[case.task.name, method]
            worse, verdict = "", ""
            if method != DENSE:
                losses = _worse(case, method, runs)
                worse = spread(losses, places)
                if len(dense) > 1:
                    verdict = "yes" if mean(losses) <= 2 * stdev([run.value for run in dense]) else "no"
            rows.append(
                [
                    f"{case.task.name} ({case.task.unit})",
                    str(method),
                    str(case.steps),
                    spread([run.value for run in each], places),
                    worse,
                    verdict,
                    f"{mean(run.dense_bytes / run.step_bytes for run in each):.0f}x",
                    f"{mean(run.dense_bytes * run.steps / run.bytes for run in each):.0f}x",
                ]
            )
    return Table(headers, rows, left=2)


def _picture(cases: Sequence[Case], methods: Sequence[Method], runs: Runs) -> Any:
    """Training loss against steps, mean over seeds; a panel a task."""
    figure, panels = drawing(len(cases), width=4 * len(cases))
    for panel, case in zip(panels, cases):
        for method, colour in zip(methods, COLOURS):
            curves = [run.loss for run in runs[case.task.name, method]]
            points = [mean(values) for values in zip(*curves)]
            at = [case.steps * (i + 1) / len(points) for i in range(len(points))]
            panel.plot(at, points, color=colour, linewidth=1.4, label=str(method))
        panel.set(title=case.task.name, xlabel="steps")
    panels[0].set_ylabel("training loss, nats")
    panels[0].legend(frameon=False, title="kept")
    return figure


def _headline(cases: Sequence[Case], methods: Sequence[Method], runs: Runs) -> str:
    parts = []
    for case in cases:
        unit, places = ("points", 1) if case.task.better > 0 else ("bits", 2)
        losses = [
            f"{mean(_worse(case, method, runs)):.{places}f} {unit} at "
            f"{mean(run.dense_bytes / run.step_bytes for run in runs[case.task.name, method]):.0f}x"
            for method in methods
            if method != DENSE and method.beta < 1
        ]
        parts.append(f"{case.task.name} {', '.join(losses)}")
    return "worse than dense by: " + "; ".join(parts)
