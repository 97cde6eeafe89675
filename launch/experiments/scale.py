"""Past this machine: volume and step time for 2 to 4096 ranks by the α–β model, and training with up to 128 workers.

The model is that of `compression-plugins advise`; seconds of codecs are measured here and scaled to a device of the
assumed memory bandwidth. Training runs every worker in one process.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from compression_plugins.advise.compute import from_shapes
from compression_plugins.advise.scale import TOPOLOGIES, Point, sweep
from compression_plugins.advise.shapes import load
from compression_plugins.advise.simulate import Machine
from compression_plugins.advise.work import Codecs
from compression_plugins.bench.timing import copy_rate
from compression_plugins.config import Config
from launch.document import COLOURS, Table
from launch.task import batches, load_digits, perceptron

from .simulated import Cluster
from .study import Study, drawing

DESCRIPTION = (
    "Simulation: volume and step time for 2 to 4096 ranks (ring, hierarchical, two-stage); training to n = 128"
)
SCHEMES = ("none", "bf16", "scalecom", "marsit", "powersgd", "double_quantization", "ef_signsgd", "topk")
RANKS = (2, 8, 32, 128, 512, 2048, 4096)
MODEL, COMPUTE_MS, BANDWIDTH, LATENCY_S, PER_NODE, MEMORY = "gpt2", 300.0, 25e9, 20e-6, 8, 2e12
#: Training: one global batch for every number of workers.
WORKERS, TRAINED, BATCH, STEPS, LR = (2, 8, 32, 128), ("none", "scalecom", "marsit", "powersgd", "topk"), 256, 150, 0.2


def run(out: Path, quick: bool) -> str:
    """Predict and train; write records, picture, tables and page; return the headline."""
    ranks, workers = (RANKS[:3], WORKERS[:1]) if quick else (RANKS, WORKERS)
    schemes, trained = (SCHEMES[:3], TRAINED[:2]) if quick else (SCHEMES, TRAINED)
    configs = {name: Config.load(name) for name in schemes}
    compute = from_shapes(load("mlp" if quick else MODEL), compute_ms=COMPUTE_MS)
    largest = 1 << 16 if quick else 25 * 2**20 // 4
    codecs = Codecs("cpu", largest, copy_rate(1 << 22, torch.device("cpu"), 7) / MEMORY)
    points: list[Point] = []
    rows = []
    with Study("scale", out, len(ranks) + len(workers) * len(trained)) as study:
        for n in ranks:
            found = sweep(configs, compute, codecs, BANDWIDTH, LATENCY_S, PER_NODE, ranks=[n], machine=Machine(MEMORY))
            points += found
            steps = {f"{p.topology} {p.scheme}": p.step_s for p in found}
            study.record(f"{n} ranks", part="model", n=n, sent={p.scheme: p.sent_bytes for p in found}, step_s=steps)
        for n in workers:
            for name in trained:
                rows.append({"n": n, "scheme": name, **train(name, n, 20 if quick else STEPS)})
                study.record(f"{n} workers: {name}", part="training", **rows[-1])
        notes = [
            f"Model: {'the perceptron' if quick else 'GPT-2 (124 M parameters)'}, {COMPUTE_MS:g} ms of computing a "
            f"step and rank (assumed), links of {BANDWIDTH / 1e9:g} Gb/s, {LATENCY_S * 1e6:g} µs; codecs timed on this "
            f"CPU and scaled to {MEMORY / 1e12:g} TB/s. ring and two-stage: every rank has a link; hierarchical: "
            f"{PER_NODE} ranks share one, inside a node nothing costs time. No other traffic, no stragglers.",
            "Volume is exact (what schemes state and transports count); docs/methods/scalecom.md has it from real "
            "interfaces for n = 2, 4, 8. Step times are predictions.",
            f"Training: MNIST-5k, 784-256-256-10, {STEPS} steps of SGD without momentum at {LR}, {BATCH} images a step "
            "over all workers, one seed; residual: norm of the workers' mean residual, over the norm of the gradient.",
        ]
        tables = [_volume(points, schemes), *(_steps(points, schemes, t) for t in TOPOLOGIES), _training(rows)]
        return study.finish("Past this machine", tables, _picture(points, schemes), notes, _headline(points, rows))


def train(scheme: str, workers: int, steps: int) -> dict[str, float]:
    """Accuracy in percent, and the size of what the workers still owe, after `steps` steps."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = perceptron(256)
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    config = Config.load({"scheme": scheme, **({"ratio": 30} if scheme in ("scalecom", "topk") else {})})
    cluster = Cluster(model, optimizer, config, workers)
    train_set, test = load_digits()
    data = [batches(train_set, BATCH // workers, rank, workers) for rank in range(workers)]
    norms: list[float] = []

    def loss(net: torch.nn.Module, rank: int) -> torch.Tensor:
        images, labels = next(data[rank])
        return torch.nn.functional.cross_entropy(net(images), labels)

    for _ in range(steps):
        _, gradients = cluster.gradients(loss)
        mean = [torch.stack(each).mean(0) for each in zip(*gradients)]
        norms.append(float(torch.cat(mean).norm()))
        cluster.apply(gradients)
    with_memory = any(bucket.scheme.memory is not None for bucket in cluster.plan.buckets)
    owed = 0.0
    if with_memory:
        owed = float(torch.stack([cluster.memory(rank) for rank in range(workers)]).mean(0).norm())
    with torch.no_grad():
        accuracy = 100 * float((model(test.images).argmax(1) == test.labels).float().mean())
    return {"accuracy": accuracy, "residual": owed / (sum(norms) / len(norms))}


def _of(points: Sequence[Point], scheme: str, topology: str) -> dict[int, Point]:
    return {p.ranks: p for p in points if p.scheme == scheme and p.topology == topology}


def _grid(points: Sequence[Point], schemes: Sequence[str], topology: str, cell: Any, head: str) -> Table:
    ranks = sorted({p.ranks for p in points})
    rows = []
    for name in schemes:
        found = _of(points, name, topology)
        rows.append([name, *(cell(found[n]) if n in found else "–" for n in ranks)])
    return Table([head, *(f"n = {n}" for n in ranks)], rows)


def _volume(points: Sequence[Point], schemes: Sequence[str]) -> Table:
    return _grid(points, schemes, "flat", lambda p: f"{p.sent_bytes / 1e6:.3g}", "MB sent per step and rank")


def _steps(points: Sequence[Point], schemes: Sequence[str], topology: str) -> Table:
    head = f"predicted ms a step, {'ring' if topology == 'flat' else topology}"
    return _grid(points, schemes, topology, lambda p: f"{1e3 * p.step_s:.0f}", head)


def _training(rows: Sequence[dict[str, Any]]) -> Table:
    cells = [[r["scheme"], str(r["n"]), f"{r['accuracy']:.1f}", f"{r['residual']:.1f}"] for r in rows]
    return Table(["scheme", "workers", "test accuracy, %", "residual / gradient"], sorted(cells, key=lambda c: c[0]))


def _picture(points: Sequence[Point], schemes: Sequence[str]) -> Any:
    figure, (left, right) = drawing(2)
    for name, colour in zip(schemes, COLOURS):
        ring, nodes = _of(points, name, "flat"), _of(points, name, "hierarchical")
        left.plot(
            ring.keys(), [p.sent_bytes / 1e6 for p in ring.values()], "o-", color=colour, markersize=3, label=name
        )
        right.plot(nodes.keys(), [1e3 * p.step_s for p in nodes.values()], "o-", color=colour, markersize=3)
    left.set(xscale="log", yscale="log", xlabel="ranks", ylabel="MB sent per step and rank")
    right.set(xscale="log", yscale="log", xlabel=f"ranks, {PER_NODE} a node", ylabel="predicted ms a step")
    left.legend(frameon=False, fontsize=8)
    return figure


def _headline(points: Sequence[Point], rows: Sequence[dict[str, Any]]) -> str:
    n = max(p.ranks for p in points)
    best = min((p for p in points if p.ranks == n and p.topology == "hierarchical"), key=lambda p: p.step_s)
    dense = _of(points, "none", "hierarchical")[n]
    spread = [r["accuracy"] for r in rows if r["scheme"] == "scalecom"]
    return (
        f"{n} ranks, {PER_NODE} a node: fastest {best.scheme}, {dense.step_s / best.step_s:.2f}x dense (predicted); "
        f"scalecom trains to {min(spread):.1f}-{max(spread):.1f} % with {rows[0]['n']} to {rows[-1]['n']} workers"
    )
