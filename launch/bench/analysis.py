"""From rows to comparisons: speed-ups, where they end, time to a target, errors of predictions."""

from __future__ import annotations

import math
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median
from typing import NamedTuple

from .readings import steps_to
from .settings import BASELINES, PEERS, REAL_MODELS, bits_per_second
from .store import Row, latest, read


class Group(NamedTuple):
    """Runs that may be compared: one job on one number of ranks."""

    model: str
    ranks: int
    compute_ms: float | None = None

    def __str__(self) -> str:
        time = f", {self.compute_ms:g} ms of computing a step" if self.compute_ms else ""
        return f"{self.model}, {self.ranks} ranks{time}"


class Who(NamedTuple):
    """What is compared: a scheme under a host framework."""

    host: str
    scheme: str

    def __str__(self) -> str:
        return self.scheme if self.scheme.startswith(f"{self.host}/") else f"{self.host}: {self.scheme}"

    def baseline(self, name: str) -> Who:
        """The uncompressed scheme `name` (`none` or `bf16`) of the same host, to compare with."""
        return Who(self.host, f"ddp/{name}" if self.host == "ddp" else name)

    @property
    def ours(self) -> bool:
        return self.scheme not in PEERS and self.scheme not in BASELINES


#: Seconds of a step by rate, ascending.
Times = dict[str, float]


@dataclass(frozen=True)
class Results:
    """The rows of some files, the last of each cell; `rows` were measured, `failures` were not."""

    rows: Sequence[Row]
    failures: Sequence[Row]

    @classmethod
    def load(cls, paths: Iterable[Path], keys: Container[str] | None = None) -> Results:
        """The cells of `keys`, or all: what an experiment's file said before it was changed stays in results.jsonl.

        Raises:
            ConfigError: a file that holds no rows.
        """
        rows = latest(row for path in paths for row in read(path))
        found = [row for key, row in rows.items() if keys is None or key in keys]
        return cls([r for r in found if "error" not in r], [r for r in found if "error" in r])

    def of(self, kind: str, group: Group | None = None) -> list[Row]:
        return [row for row in self.rows if row["kind"] == kind and (group is None or group_of(row) == group)]

    def groups(self, kind: str) -> list[Group]:
        return list(dict.fromkeys(group_of(row) for row in self.of(kind)))

    def times(self, group: Group) -> dict[Who, Times]:
        """Step time, median over seeds of the runs' medians."""
        found: dict[Who, dict[str, list[float]]] = {}
        for row in sorted(self.of("speed", group), key=lambda row: bits_per_second(row["rate"])):
            found.setdefault(who_of(row), {}).setdefault(row["rate"], []).append(row["step_s"])
        return {who: {rate: median(times) for rate, times in each.items()} for who, each in found.items()}

    def steps(self, model: str, ranks: int, target: float) -> dict[Who, list[int | None]]:
        """Steps to the target, one figure a seed."""
        found: dict[Who, list[int | None]] = {}
        for row in self.of("accuracy", Group(model, ranks)):
            found.setdefault(who_of(row), []).append(steps_to(row["points"], target, REAL_MODELS[model]))
        return found

    def targets(self, given: Mapping[str, float]) -> dict[str, float]:
        """By model: `given`, else what the newest row says."""
        rows = sorted(self.of("accuracy"), key=lambda row: row["date"])
        return {row["model"]: row["target"] for row in rows if row.get("target") is not None} | dict(given)

    def errors(self) -> list[tuple[Row, float, float]]:
        """(row of a speed cell, its step's seconds, the predicted seconds), wherever both are known."""
        predicted = {
            (row["host"], group_of(row), row["rate"], scheme): seconds
            for row in self.of("prediction")
            for scheme, seconds in row["predictions"].items()
        }
        pairs = []
        for row in self.of("speed"):
            seconds = predicted.get((row["host"], group_of(row), row["rate"], row["scheme"]))
            if seconds is not None:
                pairs.append((row, row["step_s"], seconds))
        return pairs


def group_of(row: Row) -> Group:
    return Group(row["model"], row["ranks"], row["compute_ms"])


def who_of(row: Row) -> Who:
    return Who(row["host"], row["scheme"])


def speed_ups(times: Times, base: Times) -> Times:
    """How many times faster than `base`, at the rates that both have."""
    return {rate: base[rate] / seconds for rate, seconds in times.items() if rate in base}


def phases(results: Results, group: Group) -> dict[str, dict[Who, dict[str, float]]]:
    """Seconds of a step by rate, scheme and phase, medians over seeds.

    `compute` is the step without communication; a stock host tells no more, and all the rest of its step is `exposed`.
    `other` is what is left: copies, the host's own work, and computing that communication slows down.
    """
    found: dict[str, dict[Who, list[dict[str, float]]]] = {}
    for row in sorted(results.of("speed", group), key=lambda row: bits_per_second(row["rate"])):
        parts = {"compute": min(row["compute_s"], row["step_s"])}
        rest = row["step_s"] - parts["compute"]
        if "exposed_s" in row:
            for phase in ("encode", "decode", "exposed"):
                parts[phase] = min(row[f"{phase}_s"], rest)
                rest -= parts[phase]
            parts |= {"other": rest, "hidden": max(0.0, row["wire_s"] - row["exposed_s"])}
        else:
            parts["exposed"] = rest
        found.setdefault(row["rate"], {}).setdefault(who_of(row), []).append(parts)
    return {
        rate: {who: {name: median(each[name] for each in runs) for name in runs[0]} for who, runs in schemes.items()}
        for rate, schemes in found.items()
    }


class Crossover(NamedTuple):
    """Where a speed-up ends.

    Attributes:
        rate: bits per second at which the speed-up falls to 1; infinite if it is above 1 at the fastest measured rate;
            0 if it is 1 or less at every measured rate.
        measured: the fastest measured rate.
    """

    rate: float
    measured: float

    def __str__(self) -> str:
        if self.rate == 0:
            return "nowhere"
        return f"beyond {rate_text(self.measured)}" if math.isinf(self.rate) else rate_text(self.rate)


def crossover(ratios: Times) -> Crossover | None:
    """The highest rate up to which a speed-up is above 1, between two rates by a straight line of the logarithms.

    Unlimited links have no rate and are left out. None where nothing is left.
    """
    points = sorted((bits_per_second(rate), ratio) for rate, ratio in ratios.items())
    points = [(rate, ratio) for rate, ratio in points if math.isfinite(rate)]
    if not points:
        return None
    fastest = points[-1][0]
    if points[-1][1] > 1:
        return Crossover(math.inf, fastest)
    for (slow, above), (fast, below) in reversed(list(zip(points, points[1:]))):
        if above > 1:
            part = math.log(above) / (math.log(above) - math.log(below))
            return Crossover(math.exp(math.log(slow) + part * (math.log(fast) - math.log(slow))), fastest)
    return Crossover(0.0, fastest)


def mean_error(pairs: Sequence[tuple[Row, float, float]]) -> float:
    """Mean absolute error of predictions, relative to what was measured."""
    return mean(abs(predicted / measured - 1) for _, measured, predicted in pairs)


def rate_text(rate: float) -> str:
    """`1.5 Gb/s`; three digits."""
    for size, unit in ((1e9, "Gb/s"), (1e6, "Mb/s"), (1e3, "kb/s")):
        if rate >= size:
            return f"{rate / size:.3g} {unit}"
    return f"{rate:.3g} b/s"
