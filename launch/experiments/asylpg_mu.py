"""AsyLPG at other values of mu: width of the models, bits and epochs until the target (after Table 1, right)."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from statistics import mean

from torch import nn

from compression_plugins.parameter_server.problem import Problem

from .asylpg_bits import SETTINGS, Run, figure, measure, progress
from .digits import digits, optimum, zero_softmax

DESCRIPTION = "AsyLPG: mean b_x, bits and epochs against mu, logistic regression on MNIST-5k"
MUS = (0.01, 0.1, 0.5, 1.0, 5.0, 20.0)


def run(out: Path, quick: bool) -> str:
    """Write `runs.jsonl`, `asylpg_mu.png`; print the table; return the headline."""
    target, seeds, epochs, mus = (1e-2, 1, 8, MUS[::2]) if quick else (1e-3, 3, 20, MUS)
    problem = Problem(zero_softmax(), nn.functional.cross_entropy, digits())
    best = optimum(digits())
    runs: dict[float, list[Run]] = {mu: [] for mu in mus}
    with (out / "runs.jsonl").open("w", encoding="utf-8") as records:
        for number, (mu, seed) in enumerate((mu, seed) for mu in mus for seed in range(seeds)):
            progress(number, len(mus) * seeds, f"mu {mu:g}, seed {seed}")
            result = measure("asylpg", seed, problem, best, target, epochs, mu=mu)
            runs[mu].append(result)
            record = {"target": target, "optimum": best, **SETTINGS, "mu": mu, **asdict(result)}
            records.write(json.dumps(record) + "\n")
    progress(len(mus) * seeds, len(mus) * seeds, "done")
    print(f"P* = {best:.6f}; target P - P* <= {target:g}; mean ± standard deviation over {seeds} seed(s)")
    print(f"{'mu':>6s} {'mean b_x':>14s} {'bits / 1e8':>14s} {'epochs':>14s} {'reached':>8s}")
    for mu, each in runs.items():
        bits, spent = [r.bits / 1e8 for r in each if r.bits], [r.epochs for r in each if r.epochs]
        print(
            f"{mu:6g} {figure([r.model_bits for r in each]):>14s} {figure(bits):>14s} {figure(spent):>14s} "
            f"{len(bits)}/{len(each):<6d}"
        )
    _picture(runs, out / "asylpg_mu.png")
    cheapest = min(mus, key=lambda mu: mean(r.bits or float("inf") for r in runs[mu]))
    widths = ", ".join(f"{mean(r.model_bits for r in each):.1f} at {mu:g}" for mu, each in runs.items())
    return f"fewest bits until P - P* <= {target:g} at mu = {cheapest:g}; mean b_x {widths}"


def _picture(runs: dict[float, list[Run]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    drawing, (left, right) = plt.subplots(1, 2, figsize=(9, 3.8))
    for mu, each in runs.items():
        left.plot([mu] * len(each), [r.model_bits for r in each], "o", color="#0072B2")
        reached = [r.bits for r in each if r.bits]
        right.plot([mu] * len(reached), reached, "o", color="#D55E00")
    left.set(xscale="log", xlabel="mu", ylabel="mean bits of a weight sent (b_x)")
    right.set(xscale="log", xlabel="mu", ylabel="bits until the target, snapshots included")
    for axes in (left, right):
        axes.grid(alpha=0.3)
    drawing.tight_layout()
    drawing.savefig(path, dpi=150)
    plt.close(drawing)
