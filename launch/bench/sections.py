"""The parts of the report: each a picture, its tables, and what the reader must know of them."""

from __future__ import annotations

import html
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import mean, median
from typing import Any

from launch.document import Table, svg

from . import figures
from .analysis import (
    Group,
    Results,
    Times,
    Who,
    crossover,
    group_of,
    mean_error,
    phases,
    rate_text,
    speed_ups,
    who_of,
)
from .settings import PEERS, UNITS, UNLIMITED, bits_per_second

#: Panels of a picture at most; the table has every rate.
_RATES = 3


@dataclass(frozen=True)
class Section:
    """One part. `name` is that of its files, and of its marks in docs/benchmarks."""

    name: str
    title: str
    figure: Any
    tables: Sequence[Table]
    notes: Sequence[str]

    def html(self) -> str:
        parts = [f"<section><h2>{html.escape(self.title)}</h2>", svg(self.figure), *(t.html() for t in self.tables)]
        notes = "".join(f"<li>{html.escape(note)}</li>" for note in self.notes)
        return "\n".join([*parts, f"<ul class=notes>{notes}</ul></section>"])

    def markdown(self) -> str:
        parts = [f"![{self.title}]({self.name}.png)", *(table.markdown() for table in self.tables)]
        return "\n\n".join([*parts, "\n".join(f"- {note}" for note in self.notes)]) + "\n"


def sections(results: Results, targets: Mapping[str, float]) -> list[Section]:
    """Those whose rows exist, in the order in which the question is answered."""
    found: list[Section | None] = []
    for group in results.groups("speed"):
        found += [_speed_up(results, group), _phases(results, group)]
    for model, target in results.targets(targets).items():
        found += [_target(results, group, target) for group in results.groups("accuracy") if group.model == model]
    for model in dict.fromkeys(group.model for group in results.groups("speed")):
        found.append(_volume(results, model))
    found.append(_prediction(results))
    found += [_quality(results, group) for group in results.groups("quality")]
    return [section for section in found if section is not None]


def _name(results: Results, part: str, group: Group | None = None) -> str:
    """`crossover-speed-mlp-2`: the experiment (the newest row's), the part, the model, the ranks."""
    experiment = str(max(results.rows, key=lambda row: row["date"])["provenance"]["experiment"])
    words = [experiment, part, *([group.model, str(group.ranks)] if group else [])]
    return re.sub(r"[^a-z0-9-]+", "-", "-".join(words).lower())


def _speed_up(results: Results, group: Group) -> Section | None:
    times = results.times(group)
    curves: dict[str, dict[Who, Times]] = {}
    for name in ("bf16", "none"):
        lines = {
            who: speed_ups(each, times[who.baseline(name)])
            for who, each in times.items()
            if who.baseline(name) in times and who != who.baseline(name)
        }
        curves[name] = {who: line for who, line in lines.items() if any(rate != UNLIMITED for rate in line)}
    rates = list(dict.fromkeys(rate for each in times.values() for rate in each))
    rates.sort(key=bits_per_second)
    rows = []
    for who in times:
        ends = []
        for name in ("none", "bf16"):
            end = crossover(curves[name].get(who, {}))
            ends.append(str(end) if end else "–")
        rows.append([who.host, who.scheme, *(_ms(results, group, who, rate) for rate in rates), *ends])
    headers = ["host", "scheme", *(f"ms a step, {_rate(rate)}" for rate in rates), "faster than none up to"]
    table = Table([*headers, "faster than bf16 up to"], rows, left=2)
    drawn = {f"{name}, same host": lines for name, lines in curves.items() if lines}
    title = f"Speed-up against link rate: {group}"
    figure = figures.speed_up_curves(drawn, title) if drawn else figures.step_bars(times, title)
    notes = [
        "ms a step: median over the steps of a run, then over seeds; in brackets the middle half of the steps of the "
        "first seed. Warm-up steps are left out.",
        "Up to: the highest link rate at which the scheme is the faster one, between two measured rates on a straight "
        "line of the logarithms; baselines are those of the same host framework.",
        "fake sends the bytes of a compression and does none of its work: the bound of any gain with so few bytes. It "
        "does not train.",
    ]
    return Section(_name(results, "speed", group), title, figure, [table, *_best(times, "ms")], notes)


def _ms(results: Results, group: Group, who: Who, rate: str) -> str:
    row = next((r for r in results.of("speed", group) if who_of(r) == who and r["rate"] == rate), None)
    if row is None:
        return "–"
    low, high = row["step_quartiles_s"]
    return f"{1e3 * results.times(group)[who][rate]:.0f} ({1e3 * low:.0f}–{1e3 * high:.0f})"


def _best(times: Mapping[Who, Times], unit: str) -> list[Table]:
    """Our fastest scheme beside the fastest of what there is without us, at each rate; none where one side is missing.

    Args:
        times: seconds by rate.
        unit: "ms" or "s".
    """
    rows, scale = [], {"ms": 1e3, "s": 1.0}[unit]
    for rate in sorted({rate for each in times.values() for rate in each}, key=bits_per_second):
        there = {who: each[rate] for who, each in times.items() if rate in each}
        ours = {who: t for who, t in there.items() if who.ours}
        peers = {who: t for who, t in there.items() if who.scheme in PEERS or who.scheme == "none"}
        if ours and peers:
            best, peer = min(ours, key=ours.__getitem__), min(peers, key=peers.__getitem__)
            cells = [_digits(scale * ours[best]), _digits(scale * peers[peer]), f"{peers[peer] / ours[best]:.2f}×"]
            rows.append([_rate(rate), str(best), str(peer), *cells])
    headers = ["links", "our fastest", "fastest peer", f"ours, {unit}", f"peer, {unit}", "peer / ours"]
    return [Table(headers, rows, left=3)] if rows else []


def _phases(results: Results, group: Group) -> Section:
    steps = phases(results, group)
    rates = list(steps)
    kept = rates if len(rates) <= _RATES else [rates[0], rates[len(rates) // 2], rates[-1]]
    title = f"Where a step's time goes: {group}"
    names = [*figures.PHASES, "hidden"]
    rows = [
        [_rate(rate), str(who), *(f"{1e3 * parts[name]:.1f}" if name in parts else "–" for name in names)]
        for rate, schemes in steps.items()
        for who, parts in schemes.items()
    ]
    table = Table(["links", "scheme", *(f"{name}, ms" for name in names[:-1]), "wire, hidden, ms"], rows, left=2)
    notes = [
        "compute: the same step without communication, timed during the run. encode, decode, exposed (nothing but "
        "waiting): counted by the reducer, rank 0. other: what is left, such as copies, the host's own work, and what "
        "communication takes from the computation. Stock hosts and peers tell no phases: all but compute is exposed.",
        "wire, hidden: time with an operation in flight while the host was not waiting for it.",
    ]
    figure = figures.phase_bars({rate: steps[rate] for rate in kept}, title)
    return Section(_name(results, "phases", group), title, figure, [table], notes)


def _target(results: Results, group: Group, target: float) -> Section | None:
    steps = results.steps(group.model, group.ranks, target)
    times = results.times(group)
    rates = list(dict.fromkeys(rate for each in times.values() for rate in each))
    bars: dict[str, dict[Who, list[float | None]]] = {
        rate: {
            who: [count and count * times[who][rate] for count in counts]
            for who, counts in steps.items()
            if rate in times.get(who, {})
        }
        for rate in sorted(rates, key=bits_per_second)
    }
    bars = {rate: each for rate, each in bars.items() if each}
    if not bars:
        return None
    finals: dict[Who, list[float]] = {}
    for row in results.of("accuracy", group):
        finals.setdefault(who_of(row), []).append(row["metric"])
    rows = [
        [
            who.host,
            who.scheme,
            f"{mean(finals[who]):.4g} ({min(finals[who]):.4g}–{max(finals[who]):.4g})",
            _over_seeds(counts),
            *(_over_seeds(bars[rate].get(who, [None])) for rate in bars),
        ]
        for who, counts in steps.items()
    ]
    headers = ["host", "scheme", "final metric", "steps to target", *(f"s to target, {_rate(rate)}" for rate in bars)]
    title = f"Time to {target:g} {UNITS[group.model]}: {group}"
    kept = dict(list(bars.items())[:_RATES])
    seeds = max(len(counts) for counts in steps.values())
    notes = [
        f"Seeds: {seeds}; median, lowest and highest (final metric: mean). A target is reached by two evaluations "
        "in a row.",
        "Time = steps to the target, from one long run a seed, times the median time of a step at each rate: a "
        "synchronous scheme does the same arithmetic on any network.",
    ]
    medians: dict[Who, Times] = {}
    for rate, each in bars.items():
        for who, values in each.items():
            if (middle := _median(values)) is not None:
                medians.setdefault(who, {})[rate] = middle
    tables = [Table(headers, rows, left=2), *_best(medians, "s")]
    return Section(_name(results, "target", group), title, figures.target_bars(kept, title), tables, notes)


def _median(values: Sequence[float | None]) -> float | None:
    """None if a run has no value: half of the seeds reaching a target is not reaching it."""
    known = [value for value in values if value is not None]
    return median(known) if known and len(known) == len(values) else None


def _over_seeds(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    if not known or len(known) < len(values):
        return f"{len(known)} of {len(values)} runs" if known else "–"
    return f"{_digits(median(known))} ({_digits(min(known))}–{_digits(max(known))})"


def _digits(value: float) -> str:
    """Three digits, and no exponent for large ones."""
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _volume(results: Results, model: str) -> Section | None:
    sent: dict[Who, dict[int, list[float]]] = {}
    payload: dict[Who, dict[int, float]] = {}
    for row in sorted(results.of("speed"), key=lambda row: row["ranks"]):
        if row["model"] == model:
            sent.setdefault(who_of(row), {}).setdefault(row["ranks"], []).append(row["sent_bytes"])
            if "payload_bytes" in row:
                payload.setdefault(who_of(row), {})[row["ranks"]] = row["payload_bytes"]
    sizes = sorted({size for each in sent.values() for size in each})
    if len(sizes) < 2:
        return None
    lines = {who: {size: median(values) for size, values in each.items()} for who, each in sent.items()}
    rows = [
        [who.host, who.scheme, *(f"{each[size] / 1e6:.3g}" if size in each else "–" for size in sizes)]
        for who, each in lines.items()
    ]
    title = f"Bytes a rank sends at a step: {model}"
    notes = [
        "From the counter of each rank's network interface, headers and acknowledgements included; mean over ranks and "
        "steps. Hollow: the payload that the reducer counted, median over steps.",
        "A dense ring sends 2 (n − 1) / n of the gradient's bytes: more ranks, hardly more bytes. What a scheme "
        "gathers from every rank grows with n.",
    ]
    table = Table(["host", "scheme", *(f"MB, n = {size}" for size in sizes)], rows, left=2)
    figure = figures.volume_lines(lines, payload, title)
    return Section(_name(results, f"volume-{model}"), title, figure, [table], notes)


def _prediction(results: Results) -> Section | None:
    pairs = results.errors()
    if not pairs:
        return None
    by: dict[tuple[Group, str], list[tuple[Any, float, float]]] = {}
    for pair in pairs:
        by.setdefault((group_of(pair[0]), pair[0]["rate"]), []).append(pair)
    rows = []
    for (group, rate), each in by.items():
        worst = max(each, key=lambda pair: abs(pair[2] / pair[1] - 1))
        off = f"{who_of(worst[0])} ({100 * (worst[2] / worst[1] - 1):+.0f} %)"
        rows.append([str(group), _rate(rate), off, str(len(each)), f"{100 * mean_error(each):.1f} %"])
    rows.append(["all", "", "", str(len(pairs)), f"{100 * mean_error(pairs):.1f} %"])
    title = "Predicted and measured time of a step"
    tables = [Table(["job", "links", "farthest off", "cells", "mean absolute error"], rows, left=3), *_picks(results)]
    figure = figures.prediction_points([(who_of(row), m, p) for row, m, p in pairs], title)
    notes = [
        "Predicted by `compression-plugins advise` in the same network before the runs. Grey band: 15 %.",
        "advice: what it recommended, which is the simplest that no other beats by 5 %; fastest: of what it may "
        "recommend and was measured.",
    ]
    return Section(_name(results, "prediction"), title, figure, tables, notes)


def _picks(results: Results) -> list[Table]:
    """What following the advice costs, against doing nothing and against the best there was."""
    rows = []
    for row in results.of("prediction"):
        measured = {
            who.scheme: each[row["rate"]]
            for who, each in results.times(group_of(row)).items()
            if who.host == row["host"] and who.scheme in row["predictions"] and row["rate"] in each
        }
        pick, able = measured.get(row["recommended"]), {s: measured[s] for s in row["eligible"] if s in measured}
        if pick is None or "none" not in able:
            continue
        best = min(able, key=able.__getitem__)
        times = [_digits(1e3 * t) for t in (pick, able["none"], able[best])]
        words = [str(group_of(row)), _rate(row["rate"]), row["host"], row["recommended"], best]
        rows.append([*words, *times, f"{pick / able['none']:.2f}", f"{pick / able[best]:.2f}"])
    headers = ["job", "links", "host", "advice", "fastest", "advice, ms", "none, ms", "fastest, ms", "advice / none"]
    return [Table([*headers, "advice / fastest"], rows, left=5)] if rows else []


def _quality(results: Results, group: Group) -> Section:
    rows = results.of("quality", group)
    title = f"What a scheme does to the gradient: {group}"
    names = ("target_ratio", "ratio", "vnmse", "cosine", "bias", "state_bytes_per_value")
    table = Table(
        ["scheme", "nominal ratio", "achieved ratio", "vNMSE", "cosine", "bias", "state, B a value"],
        [[row["scheme"], *(f"{row[name]:.3g}" for name in names)] for row in rows],
    )
    figure = figures.quality_points({row["scheme"]: (row["ratio"], row["vnmse"]) for row in rows}, title)
    steps = rows[0]["steps"]
    notes = [
        f"{steps} gradients in a row of dense training, the same for every scheme; all ranks in one process.",
        "ratio: bytes of a dense fp32 ring over those sent; nominal is a usual step's, achieved counts dense ones too. "
        "vNMSE: ‖result − mean gradient‖² / ‖mean gradient‖² of one step; bias: the same of the sums over all "
        "steps, which memories and unbiased rounding make small. A method that sends signs or updates does not try to "
        "keep the gradient's length, so that its vNMSE says little; its cosine does.",
    ]
    return Section(_name(results, "quality", group), title, figure, [table], notes)


def _rate(rate: str) -> str:
    return UNLIMITED if rate == UNLIMITED else rate_text(bits_per_second(rate))
