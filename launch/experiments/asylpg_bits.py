"""Bits until the loss is within a target of the optimum, for all six algorithms (after Table 1, left, of AsyLPG)."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from torch import nn

from compression_plugins.parameter_server.options import Options
from compression_plugins.parameter_server.problem import Problem
from compression_plugins.parameter_server.server import Server
from compression_plugins.parameter_server.simulate import Simulation
from compression_plugins.parameter_server.worker import Worker

from .digits import L2, digits, optimum, zero_softmax

DESCRIPTION = "bits until the loss is near the optimum, six algorithms, logistic regression on MNIST-5k"
METHODS = ("asyfpg", "qsvrg", "asylpg", "sparse_asylpg", "acc_asyfpg", "acc_asylpg")
#: Step size, batch and inner loop of the numpy study in our notes on the paper; the paper's own are not known to us.
SETTINGS = {"workers": 4, "tau": 4, "lr": 1.0, "batch_size": 20, "inner_steps": 250, "bits": 8, "mu": 0.5, "l2": L2}
#: What a run's delays cycle through: realised where some worker's gradient is that old, at most tau.
DELAYS = (3, 1, 4, 2, 3, 0, 3)
EVERY = 25


@dataclass
class Run:
    """One algorithm, one seed. `bits` is None where the target was not reached.

    Attributes:
        bits: as the paper counts them, snapshots included, when the gap was first at or below the target.
        inner_bits: the same without snapshots.
        epochs: epochs until then, in fractions.
        model_bits: mean width of the models sent; 32 is fp32, 0 where the model was the snapshot.
        points: (updates, bits, gap).
    """

    method: str
    seed: int
    bits: int | None = None
    inner_bits: int | None = None
    epochs: float | None = None
    model_bits: float = 0.0
    survivors: float | None = None
    max_delay: int = 0
    points: list[tuple[int, int, float]] = field(default_factory=list)


def measure(method: str, seed: int, problem: Problem, best: float, target: float, epochs: int, **changes: Any) -> Run:
    """Run until the gap P(x) - P* is at the target. The loss is evaluated beside the run and costs no bits."""
    options = Options.load({**SETTINGS, "method": method, "seed": seed, "epochs": epochs, **changes})
    result = Run(method, seed)

    def watch(server: Server) -> None:
        if server.step < EVERY * (len(result.points) + 1):
            return
        gap = problem.loss(server.state.x) + server.prox.value(server.state.x) - best
        result.points.append((server.step, server.traffic.bits, gap))
        if gap <= target:
            result.bits = server.traffic.bits
            result.inner_bits = server.traffic.bits - server.traffic.snapshot_bits
            result.epochs = server.step / server.inner_steps
            server.finish("the target is reached")

    server = Server(options, problem.start(), problem.samples)
    workers = [Worker(rank, options, problem) for rank in range(options.workers)]
    Simulation(server, workers, DELAYS, on_update=watch).run()
    result.model_bits = mean(row.model_bits for row in server.history)
    shares = [row.survivors for row in server.history if row.survivors is not None]
    result.survivors = mean(shares) if shares else None
    result.max_delay = max(server.delays)
    return result


def run(out: Path, quick: bool) -> str:
    """Write `runs.jsonl`, `asylpg_bits.png`; print the table; return the headline."""
    target, seeds, epochs = (1e-2, 1, 6) if quick else (1e-3, 3, 15)
    data = digits()
    problem = Problem(zero_softmax(), nn.functional.cross_entropy, data)
    best = optimum(data)
    jobs = [(method, seed) for method in METHODS for seed in range(seeds)]
    runs = []
    with (out / "runs.jsonl").open("w", encoding="utf-8") as records:
        for number, (method, seed) in enumerate(jobs):
            progress(number, len(jobs), f"{method}, seed {seed}")
            runs.append(measure(method, seed, problem, best, target, epochs))
            record = {"target": target, "optimum": best, **SETTINGS, **asdict(runs[-1])}
            records.write(json.dumps(record) + "\n")
    progress(len(jobs), len(jobs), "done")
    by_method = {method: [r for r in runs if r.method == method] for method in METHODS}
    print(_table(by_method, target, best))
    _picture(by_method, target, out / "asylpg_bits.png")
    return _headline(by_method, target, seeds)


def _ratio(by_method: dict[str, list[Run]], method: str, attribute: str) -> list[float]:
    """Of the same seed's AsyFPG."""
    pairs = [(getattr(a, attribute), getattr(b, attribute)) for a, b in zip(by_method["asyfpg"], by_method[method])]
    return [a / b for a, b in pairs if a and b]


def figure(values: Sequence[float], places: int = 2) -> str:
    """Mean ± standard deviation."""
    if not values:
        return "-"
    spread = f" ±{stdev(values):.{places}f}" if len(values) > 1 else ""
    return f"{mean(values):.{places}f}{spread}"


def _table(by_method: dict[str, list[Run]], target: float, best: float) -> str:
    lines = [
        f"P* = {best:.6f}; target P - P* <= {target:g}; mean ± standard deviation over seeds",
        f"{'algorithm':15s} {'bits / 1e8':>14s} {'saving':>14s} {'without snapshots':>18s} {'epochs':>13s} "
        f"{'mean b_x':>14s} {'survivors %':>12s}",
    ]
    for method, runs in by_method.items():
        bits = [r.bits / 1e8 for r in runs if r.bits]
        lines.append(
            f"{method:15s} {figure(bits):>14s} {figure(_ratio(by_method, method, 'bits')):>14s} "
            f"{figure(_ratio(by_method, method, 'inner_bits')):>18s} "
            f"{figure([r.epochs for r in runs if r.epochs]):>13s} {figure([r.model_bits for r in runs]):>14s} "
            f"{figure([100 * r.survivors for r in runs if r.survivors]):>12s}"
        )
    return "\n".join(lines)


def _headline(by_method: dict[str, list[Run]], target: float, seeds: int) -> str:
    def saving(method: str) -> str:
        return f"{method} {figure(_ratio(by_method, method, 'bits'))}x"

    def pick(method: str) -> str:
        return f"{method} {figure(_ratio(by_method, method, 'inner_bits'))}x"

    names = ("asylpg", "acc_asylpg", "sparse_asylpg")
    return (
        f"bits saved over asyfpg until P - P* <= {target:g}, {seeds} seed(s), snapshots counted: "
        f"{', '.join(map(saving, names))}; not counted: {', '.join(map(pick, names))}"
    )


def _picture(by_method: dict[str, list[Run]], target: float, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    colours = ["#555555", "#E69F00", "#0072B2", "#009E73", "#CC79A7", "#D55E00"]
    drawing, axes = plt.subplots(figsize=(7, 4.5))
    for (method, runs), colour in zip(by_method.items(), colours):
        for number, each in enumerate(runs):
            x: list[Any] = [bits for _, bits, _ in each.points]
            y: list[Any] = [max(gap, 1e-8) for _, _, gap in each.points]
            axes.plot(x, y, color=colour, alpha=0.8, linewidth=1.2, label=method if number == 0 else None)
    axes.axhline(target, color="black", linewidth=0.8, linestyle="--")
    axes.set(xscale="log", yscale="log", xlabel="bits sent and received, snapshots included", ylabel="P(x) - P*")
    axes.legend()
    axes.grid(alpha=0.3)
    drawing.tight_layout()
    drawing.savefig(path, dpi=150)
    plt.close(drawing)


def progress(done: int, total: int, text: str) -> None:
    """One line on a terminal, one line a call elsewhere."""
    bar = "#" * (20 * done // total)
    end = "\n" if done == total or not sys.stderr.isatty() else ""
    print(f"\r[{bar:20s}] {done}/{total} {text:32s}", end=end, file=sys.stderr, flush=True)
