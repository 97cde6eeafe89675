"""Where plain error feedback fails and ScaleCom's filter does not: many workers, learning rate scaled with the batch.

The recipe of the paper's large-batch runs: a worker always takes 32 samples, the learning rate grows in proportion to
the number of workers and is warmed up, the number of epochs stays. Momentum, the optimizer's, follows the average. The
last case is without it: there plain error feedback holds, and larger steps broke dense training before they broke it.
`--quick` trains on the 4,000 digits of MNIST-5k.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value, vmap

from compression_plugins.config import Config
from launch.document import COLOURS, Table
from launch.task import Digits, batches, load_digits

from ..fashion import load_fashion
from ..simulated import Cluster
from ..study import Study, drawing, spread

DESCRIPTION = "large batches with a scaled learning rate: plain error feedback against the filter, n = 8, 32, 64"
NAME = "scalecom-large-batch"
BATCH = 32
RATIO = 100
#: Shares of the run: learning rate rises from 0 (and then falls to 0 in a line), gradients travel dense.
LR_WARMUP, DENSE_WARMUP = 0.2, 0.05
#: A loss of 20 times that of guessing ends the run.
DIVERGED = 20 * math.log(10)
TICKS = (0.1, 0.3, 1, 3, 10)


class Case(NamedTuple):
    """One setting. `lr` is the peak; `betas` are the filters to try, 1 being plain error feedback."""

    workers: int
    lr: float
    momentum: float
    betas: tuple[float, ...]


#: Peak learning rates are chosen for dense training at n = 64: 0.1 is within half a point of the best of 0.05, 0.1, 0.2
#: and 0.4, and those of n = 8 and 32 follow by linear scaling. Without momentum 0.5 was the best of 0.25, 0.5 and 1, at
#: n = 32.
CASES = (
    Case(8, 0.0125, 0.9, (1.0, 0.1)),
    Case(32, 0.05, 0.9, (1.0, 0.3, 0.1)),
    Case(64, 0.1, 0.9, (1.0, 0.3, 0.1)),
    Case(64, 0.5, 0.0, (1.0, 0.1)),
)
QUICK = (Case(16, 0.05, 0.9, (1.0, 0.1)), Case(16, 0.25, 0.0, (1.0,)))


@dataclass
class Run:
    """One training. `beta` None is dense; a run that diverged has neither accuracy nor loss.

    Attributes:
        accuracy: of the test images, in per cent.
        loss: mean training loss of the last twentieth of the steps, in nats.
        diverged: the step at which it did, or None.
        curve: training loss of every step, the mean over workers.
    """

    case: Case
    beta: float | None
    seed: int
    steps: int
    accuracy: float | None = None
    loss: float | None = None
    diverged: int | None = None
    curve: list[float] = field(default_factory=list)


def run(out: Path, quick: bool) -> str:
    cases, seeds, epochs = (QUICK, 1, 15) if quick else (CASES, 3, 6)
    data = load_digits() if quick else load_fashion()
    jobs = [(case, beta, seed) for case in cases for beta in (None, *case.betas) for seed in range(seeds)]
    runs = []
    with Study(NAME, out, total=len(jobs)) as study:
        for case, beta, seed in jobs:
            runs.append(train(case, beta, seed, data, epochs))
            study.record(f"n = {case.workers}, {method(beta)}, seed {seed}", **case._asdict(), **asdict(runs[-1]))
        rows = [[r for r in runs if (r.case, r.beta) == (c, beta)] for c in cases for beta in (None, *c.betas)]
        notes = [
            f"784-128-10 perceptron, {BATCH} samples a worker, {epochs} epochs, 1 value in {RATIO} kept; mean ± "
            f"standard deviation of {seeds} seed(s). Learning rate: up in a line over the first {LR_WARMUP:.0%}, "
            f"then down to 0; the first {DENSE_WARMUP:.0%} are sent dense. Training loss: over the last twentieth.",
            f"Diverged: a loss above {DIVERGED:.0f} or not finite ends the run.",
        ]
        return study.finish(
            "ScaleCom at large batches", [_table(rows)], _picture(cases, runs, epochs), notes, _headline(rows, cases)
        )


def train(case: Case, beta: float | None, seed: int, data: tuple[Digits, Digits], epochs: int) -> Run:
    """Train one case with one `beta` (the residual's filter) and one seed, for `epochs`; the curve of its losses."""
    train_set, test_set = data
    steps = epochs * (len(train_set.labels) // (BATCH * case.workers))
    result = Run(case, beta, seed, steps)
    workers = cluster(case, beta, seed, steps)
    rise = LR_WARMUP * steps
    schedule = torch.optim.lr_scheduler.LambdaLR(
        workers.optimizer, lambda step: min((step + 1) / rise, (steps - step) / (steps - rise))
    )
    for batch in islice(batches(train_set, BATCH * case.workers, 0, 1, seed), steps):
        parts = (part.unflatten(0, (workers.workers, -1)) for part in batch)
        per_worker, losses = gradients(workers, *parts)
        result.curve.append(float(losses.mean()))
        if not result.curve[-1] <= DIVERGED:
            result.diverged = len(result.curve) - 1
            return result
        workers.apply(per_worker)
        schedule.step()
    with torch.no_grad():
        guesses = workers.model(test_set.images).argmax(1)
    result.accuracy = 100 * float((guesses == test_set.labels).float().mean())
    result.loss = mean(result.curve[-max(1, steps // 20) :])
    return result


def cluster(case: Case, beta: float | None, seed: int, steps: int) -> Cluster:
    """The perceptron and its workers. Dense needs no worker's own gradient: it is one worker with the batch of all."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 10))
    optimizer = torch.optim.SGD(model.parameters(), case.lr, momentum=case.momentum)
    if beta is None:
        return Cluster(model, optimizer, Config.load({"scheme": "none"}), 1)
    document = {"scheme": "scalecom", "ratio": RATIO, "beta": beta, "warmup_steps": int(DENSE_WARMUP * steps)}
    return Cluster(model, optimizer, Config.load(document), case.workers)


def method(beta: float | None) -> str:
    if beta is None:
        return "dense"
    return "plain error feedback" if beta == 1 else f"filter, β = {beta:g}"


def gradients(workers: Cluster, images: Tensor, labels: Tensor) -> tuple[list[list[Tensor]], Tensor]:
    """`gradients[rank][bucket]` for `Cluster.apply`, and each worker's loss (fp32 [workers]), in one pass.

    One after another, 64 workers would cost more than twice as much.

    Args:
        images: fp32 [workers, batch, 784].
        labels: int64 [workers, batch].
    """

    def loss(parameters: dict[str, Tensor], images: Tensor, labels: Tensor) -> Tensor:
        return nn.functional.cross_entropy(functional_call(workers.model, parameters, (images,)), labels)

    parameters = {name: p.detach() for name, p in workers.parameters.items()}
    grads, losses = vmap(grad_and_value(loss), in_dims=(None, 0, 0))(parameters, images, labels)
    buckets = [torch.cat([grads[s.name].flatten(1) for s in b.segments], dim=1) for b in workers.plan.buckets]
    return [list(flats) for flats in zip(*(bucket.unbind() for bucket in buckets))], losses


def _table(rows: Sequence[Sequence[Run]]) -> Table:
    headers = ["method", "workers", "batch", "momentum", "lr", "test accuracy, %", "training loss", "diverged"]
    cells = []
    for runs in rows:
        first, ended = runs[0], [r for r in runs if r.diverged is None]
        cells.append(
            [
                method(first.beta),
                str(first.case.workers),
                str(first.case.workers * BATCH),
                f"{first.case.momentum:g}",
                f"{first.case.lr:g}",
                spread([r.accuracy for r in ended], 1),
                spread([r.loss for r in ended], 3),
                f"{len(runs) - len(ended)} of {len(runs)}",
            ]
        )
    return Table(headers, cells)


def _picture(cases: Sequence[Case], runs: Sequence[Run], epochs: int) -> Any:
    """Training loss against epochs: a panel per case, a line per seed, a cross where it diverged."""
    from matplotlib.lines import Line2D

    figure, panels = drawing(len(cases), width=3.3 * len(cases), height=3.8)
    betas = sorted({beta for case in cases for beta in case.betas}, reverse=True)
    colours = dict(zip([None, *betas], COLOURS))
    for panel, case in zip(panels, cases):
        for each in (r for r in runs if r.case == case):
            width = max(1, each.steps // 50)
            points = [mean(each.curve[i : i + width]) for i in range(0, len(each.curve), width)]
            at = [epochs * min(width * (i + 1), len(each.curve)) / each.steps for i in range(len(points))]
            panel.plot(at, points, color=colours[each.beta], linewidth=1.2, alpha=0.8)
            if each.diverged is not None:
                panel.plot(at[-1:], points[-1:], "x", color=colours[each.beta])
        panel.set_title(f"n = {case.workers}, lr {case.lr:g}, momentum {case.momentum:g}", fontsize=10)
        panel.set(xlabel="epochs", yscale="log", ylim=(0.1, 20), yticks=TICKS, yticklabels=map(str, TICKS))
        panel.minorticks_off()
    panels[0].set_ylabel("training loss")
    lines = [Line2D([], [], color=colour, label=method(beta)) for beta, colour in colours.items()]
    figure.legend(handles=lines, loc="outside lower center", ncols=len(lines), frameon=False)
    return figure


def _headline(rows: Sequence[Sequence[Run]], cases: Sequence[Case]) -> str:
    parts = []
    for case in cases:
        results = []
        for runs in (row for row in rows if row[0].case == case):
            failed = sum(r.diverged is not None for r in runs)
            outcome = f"diverged {failed} of {len(runs)}" if failed else spread([r.accuracy for r in runs], 1)
            results.append(f"{method(runs[0].beta)} {outcome}")
        parts.append(f"n = {case.workers}, momentum {case.momentum:g}: {', '.join(results)}")
    return "test accuracy, %: " + "; ".join(parts)
