"""From predicted steps to one recommendation, with its reason."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from ..bench.table import aligned
from ..config import Config
from .accuracy import LIMIT
from .network import Given, Measured, rate_text
from .predict import Step

BASELINES = ("none", "bf16")


@dataclass(frozen=True)
class Row:
    """A candidate.

    Attributes:
        label: name of a scheme, or path of a configuration.
        step: None where it cannot run, and `note` says why.
        error: see `accuracy.update_error`.
        adaptive: the job's optimizer divides by the root of a second moment, as Adam does.
    """

    label: str
    config: Config
    step: Step | None
    error: float = 0.0
    note: str = ""
    adaptive: bool = False

    @property
    def eligible(self) -> bool:
        """A compressor that may be recommended."""
        able = self.error <= LIMIT and not self.bound and not self.misses
        return self.step is not None and self.label not in BASELINES and able

    @property
    def misses(self) -> bool:
        """Whether training misses the loss of dense training with this optimizer, by docs/benchmarks/parity.md."""
        return self.adaptive and self.config.every == 1 and not self.config.suits_adam

    @property
    def bound(self) -> bool:
        """No method, but what the best one could not beat."""
        return self.config.scheme.name == "fake"


@dataclass(frozen=True)
class Choice:
    """A recommendation: `row` is what to use, `best` the fastest compressor, whether or not it is that."""

    row: Row
    best: Row | None
    none: Row
    bf16: Row

    def line(self) -> str:
        """The last line that `advise` prints."""
        step = _of(self.row).step_s
        over = _of(self.none).step_s / step
        if self.row is self.none:
            return f"recommend: none (do not compress{self._nearest()})"
        if self.row is self.bf16:
            return f"recommend: bf16 ({over:.2g}x faster than none{self._nearest()})"
        return (
            f"recommend: {self.row.label} ({over:.2g}x faster than none, {_of(self.bf16).step_s / step:.2g}x than bf16)"
        )

    def _nearest(self) -> str:
        others = [row for row in (self.bf16, self.best) if row is not None and row is not self.row]
        if not others:
            return ""
        best = min(others, key=lambda row: _of(row).step_s)
        return f"; {best.label} would be {ratio_text(_of(self.row).step_s / _of(best).step_s)}"


def choose(rows: Sequence[Row], margin: float = 0.05) -> Choice:
    """The simplest of: nothing, bf16, the best compressor; each has to beat what is simpler by `margin`.

    Compressors within `margin` of the fastest are equal; of these the one with the smallest error is the best.
    `rows` must hold `none` and `bf16`.
    """
    known = {row.label: row for row in rows}
    none, bf16 = known["none"], known["bf16"]
    simple = bf16 if _of(bf16).step_s * (1 + margin) < _of(none).step_s else none
    able = [row for row in rows if row.eligible]
    if not able:
        return Choice(simple, None, none, bf16)
    fastest = min(_of(row).step_s for row in able)
    best = min((row for row in able if _of(row).step_s <= fastest * (1 + margin)), key=lambda row: row.error)
    bar = min(_of(none).step_s, _of(bf16).step_s)
    return Choice(best if _of(best).step_s * (1 + margin) < bar else simple, best, none, bf16)


def reasons(
    choice: Choice, network: Given | Measured, at: Callable[[Row, Given | Measured], Step], margin: float
) -> str:
    """Why, in a few sentences.

    Args:
        at: the step of a row on another network; used to look for the rates between which the advice changes.
    """
    none, bf16, picked = _of(choice.none), _of(choice.bf16), _of(choice.row)
    share = none.exposed_s / none.step_s
    text = (
        f"Uncompressed, {1e3 * none.wire_s:.0f} ms of communication leave {1e3 * none.exposed_s:.1f} ms exposed of a "
        f"step of {1e3 * none.step_s:.1f} ms ({100 * share:.0f} %)."
    )
    if choice.row is choice.none:
        why = "that is too little to win" if share < 2 * margin else "coding would cost more than the bytes it saves"
        text += f" Do not compress: {why}."
        edge = _edge(lambda net: at(choice.none, net).exposed_s <= margin * at(choice.none, net).step_s, network)
        if edge:
            text += f" Communication is hidden (under {100 * margin:.0f} % of a step) from {edge} on."
    elif choice.row is choice.bf16:
        text += (
            f" 16-bit values halve the bytes and leave {1e3 * bf16.exposed_s:.1f} ms; no compressor is "
            f"{100 * margin:.0f} % faster, which is what its loss of accuracy has to be worth."
        )
    else:
        text += (
            f" {choice.row.label} sends {none.sent_bytes / max(1.0, picked.sent_bytes):.3g}x fewer bytes for "
            f"{1e3 * picked.codec_s:.1f} ms of its own work and leaves {1e3 * picked.exposed_s:.1f} ms exposed "
            f"(bf16: {1e3 * bf16.exposed_s:.1f} ms)."
        )
    best = choice.best
    if best is not None:
        limit = _edge(
            lambda net: (
                at(best, net).step_s * (1 + margin) > min(at(choice.none, net).step_s, at(choice.bf16, net).step_s)
            ),
            network,
        )
        if limit:
            text += f" {best.label} is worth its loss of accuracy only below {limit}."
    return text


def faster(network: Given | Measured, factor: float) -> Given | Measured:
    """The same network with `factor` times the rate and the same latencies."""
    if isinstance(network, Given):
        return replace(network, bandwidth=network.bandwidth * factor)
    return replace(network, lines={kind: line.faster(factor) for kind, line in network.lines.items()})


def _edge(holds: Callable[[Given | Measured], bool], network: Given | Measured) -> str:
    """The rate from which `holds` on; "" where it always or never does between a 1000th and 1000 times the rate."""
    base = network.bandwidth if isinstance(network, Given) else 8 / max(1e-15, network.lines["all_reduce"].beta_s)
    low, high = -3.0, 3.0
    if holds(faster(network, 10**low)) or not holds(faster(network, 10**high)):
        return ""
    while high - low > 0.02:
        middle = (low + high) / 2
        low, high = (low, middle) if holds(faster(network, 10**middle)) else (middle, high)
    rate = base * 10**high
    digits = 1 - math.floor(math.log10(rate))
    return rate_text(round(rate, digits))


def table(rows: Sequence[Row], choice: Choice) -> str:
    """All candidates, the fastest first; `*` is the one to use."""
    header = ["", "scheme", "step ms", "compute", "codec", "exposed", "MB sent", "x none", "x bf16", "error", "note"]
    lines = [header]
    none, bf16 = _of(choice.none).step_s, _of(choice.bf16).step_s
    for row in sorted(rows, key=lambda row: row.step.step_s if row.step else math.inf):
        mark = "*" if row is choice.row else ""
        if row.step is None:
            lines.append([mark, row.label, *["-"] * 8, row.note])
            continue
        step = row.step
        numbers = [1e3 * t for t in (step.step_s, step.compute_s, step.codec_s, step.exposed_s)]
        cells = [f"{ms:.4g}" for ms in numbers]
        cells += [f"{step.sent_bytes / 1e6:.4g}", f"{none / step.step_s:.2f}", f"{bf16 / step.step_s:.2f}"]
        lines.append([mark, row.label, *cells, f"{row.error:.2g}", row.note])
    return "\n".join(aligned(lines, words=(0, 1, 10)))


def ratio_text(ratio: float) -> str:
    """1.25 -> "25 % faster"."""
    percent = 100 * (ratio - 1)
    return f"{percent:.0f} % faster" if percent >= 0.5 else f"{-percent:.0f} % slower" if percent <= -0.5 else "as fast"


def _of(row: Row) -> Step:
    assert row.step is not None
    return row.step
