"""What a collective costs: alpha + beta * bytes, fitted to the ranks of a job, or in closed form from a link's numbers.

Bytes are those that a rank sends (`work.sent_bytes`). Between measured sizes, predictions interpolate the measured
times, for links with buffers are no straight lines (a shaped link lets the first bytes pass at once). A measurement is
for one number of ranks; closed forms are for any:

    flat          rings over all ranks, each hop a latency
    hierarchical  rings inside nodes of g ranks and between the nodes, whose ranks share one link
    two-stage     everybody to everybody at once: two rounds for an all-reduce, one for an all-gather
"""

from __future__ import annotations

import math
import re
from bisect import bisect_left
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple, Protocol

from ..errors import ConfigError
from .work import sent_bytes

KINDS = ("all_reduce", "all_gather", "all_to_all", "broadcast", "exchange")
Topology = Literal["flat", "hierarchical", "two-stage"]
_BITS = {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12}
_RATE = re.compile(r"^(\d+(?:\.\d+)?)\s*([kmgt]?)(?:bit|bit/s|b|b/s|bps)$", re.IGNORECASE)
_BYTES = re.compile(r"^(\d+(?:\.\d+)?)\s*([MGT])B(?:/s)?$")
_TIME = re.compile(r"^(\d+(?:\.\d+)?)\s*(ns|us|ms|s)$")
_SECONDS = {"ns": 1e-9, "us": 1e-6, "ms": 1e-3, "s": 1.0}


def parse_rate(text: str) -> float:
    """Bits per second: 25Gb, 100mbit, 1gbit (as `tc` writes it), 10Gbps. Raises `ConfigError` for anything else.

    Bytes (`25GB`, and tc's `mbps`, which means bytes) are refused: an eightfold mistake is not worth a guess.
    """
    match = _RATE.match(text.strip())
    if not match or re.search(r"\dB|[kmgtKMGT]B|^[\d.\s]+[kmgt]?bps$", text.strip()):
        raise ConfigError(f"{text!r} is no bandwidth; write bits a second: 25Gb, 100mbit, 1gbit or 10Gbps")
    rate = float(match[1]) * _BITS[match[2].lower()]
    if rate <= 0:
        raise ConfigError(f"{text!r}: a bandwidth is above 0")
    return rate


def parse_time(text: str) -> float:
    """Seconds: 20us, 1.5ms, 0s. Raises `ConfigError` for anything else."""
    match = _TIME.match(text.strip())
    if not match:
        raise ConfigError(f"{text!r} is no latency; write a number and ns, us, ms or s: 20us")
    return float(match[1]) * _SECONDS[match[2]]


def parse_bytes_rate(text: str) -> float:
    """Bytes per second: 2TB, 900GB/s. Raises `ConfigError` for anything else."""
    match = _BYTES.match(text.strip())
    if not match or float(match[1]) <= 0:
        raise ConfigError(f"{text!r} is no memory bandwidth; write bytes a second: 900GB or 2TB")
    return float(match[1]) * _BITS[match[2].lower()]


class Cost(NamedTuple):
    """What one collective takes: `latency_s` passes beside others, then the wire is its own for `busy_s`."""

    latency_s: float
    busy_s: float


class Network(Protocol):
    """Attributes:
    size: ranks.
    cpu_s_per_byte: CPU seconds of this host, for each byte that a rank sends.
    post_s: seconds that the calling thread needs to start a collective.
    """

    @property
    def size(self) -> int: ...

    @property
    def cpu_s_per_byte(self) -> float: ...

    @property
    def post_s(self) -> float: ...

    def cost(self, kind: str, nbytes: float) -> Cost:
        """What a collective of that kind (a method of `Transport`) takes on `nbytes` of payload, in seconds."""
        ...

    def describe(self) -> list[str]:
        """What is known of the network, as lines for a person."""
        ...


@dataclass(frozen=True)
class Line:
    """t = alpha_s + beta_s * bytes sent, or what was measured.

    Attributes:
        gap_s: part of alpha for which the wire cannot serve another collective; the rest overlaps.
        error: mean relative difference from the measured times.
        points: (bytes sent, seconds) measured, by size, times not falling; empty for the line alone.
    """

    alpha_s: float
    beta_s: float
    gap_s: float = 0.0
    error: float = 0.0
    points: tuple[tuple[float, float], ...] = ()

    def seconds(self, sent: float) -> float:
        """Straight between measured sizes, constant below the first, and beyond the last as steep as before it."""
        if len(self.points) < 2:
            return self.alpha_s + self.beta_s * sent
        if sent <= self.points[0][0]:
            return self.points[0][1]
        i = min(bisect_left(self.points, (sent, -math.inf)), len(self.points) - 1)
        (x0, t0), (x1, t1) = self.points[i - 1 : i + 1]
        return t0 + (t1 - t0) / (x1 - x0) * (sent - x0)

    def faster(self, factor: float) -> Line:
        """The same latency, and `factor` times the rate."""
        first = self.points[0][1] if self.points else 0.0
        points = tuple((x, first + (t - first) / factor) for x, t in self.points)
        return replace(self, beta_s=self.beta_s / factor, points=points)


def fit(points: list[tuple[float, float]]) -> Line:
    """Least squares of the relative error of `alpha + beta * bytes`, both at least 0, over (bytes, seconds)."""
    points = _rising(points)
    best = None
    for use_alpha, use_beta in ((True, True), (True, False), (False, True)):
        alpha, beta = _solve(points, use_alpha, use_beta)
        if alpha < 0 or beta < 0:
            continue
        residuals = [(alpha + beta * x - t) / t for x, t in points]
        loss = sum(r * r for r in residuals)
        if best is None or loss < best[0] * (1 - 1e-9):
            error = sum(map(abs, residuals)) / len(points)
            best = (loss, Line(alpha, beta, alpha, error, tuple(points)))
    assert best is not None
    return best[1]


def _rising(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """By size; where a larger one took less time, which is noise, both get the mean."""
    groups: list[list[float]] = []  # [total seconds, how many]
    ordered = sorted(points)
    for _, t in ordered:
        groups.append([t, 1])
        while len(groups) > 1 and groups[-2][0] / groups[-2][1] > groups[-1][0] / groups[-1][1]:
            total, count = groups.pop()
            groups[-1] = [groups[-1][0] + total, groups[-1][1] + count]
    times = [total / count for total, count in groups for _ in range(int(count))]
    return [(x, t) for (x, _), t in zip(ordered, times)]


def _solve(points: list[tuple[float, float]], use_alpha: bool, use_beta: bool) -> tuple[float, float]:
    """Normal equations of sum (a / t + b x / t - 1)^2."""
    saa = sum(1 / t**2 for _, t in points)
    sab = sum(x / t**2 for x, t in points)
    sbb = sum((x / t) ** 2 for x, t in points)
    sa, sb = sum(1 / t for _, t in points), sum(x / t for x, t in points)
    determinant = saa * sbb - sab**2
    if not use_beta:
        return sa / saa, 0.0
    if not use_alpha:
        return 0.0, sb / sbb if sbb else 0.0
    if determinant <= 1e-12 * saa * sbb:  # one size only
        return -1.0, -1.0
    return (sa * sbb - sb * sab) / determinant, (saa * sb - sab * sa) / determinant


@dataclass(frozen=True)
class Measured:
    """The network between the ranks of a job."""

    size: int
    lines: dict[str, Line]
    cpu_s_per_byte: float = 0.0
    post_s: float = 0.0
    name: str = "measured"

    def cost(self, kind: str, nbytes: float) -> Cost:
        line = self.lines[kind]
        seconds = max(0.0, line.seconds(sent_bytes(kind, nbytes, self.size)) - self.post_s)
        latency = max(0.0, min(line.alpha_s, line.seconds(0.0)) - self.post_s - line.gap_s)
        return Cost(min(latency, seconds), max(0.0, seconds - latency))

    def describe(self) -> list[str]:
        rows = [f"network: {self.name}, {self.size} ranks, measured; time = latency + bytes sent / rate"]
        for kind, line in self.lines.items():
            rate = f"{8e-9 / line.beta_s:.3g} Gb/s" if line.beta_s else "unlimited"
            rows.append(
                f"  {kind.replace('_', '-'):10}  latency {1e3 * line.alpha_s:7.3f} ms  rate {rate:>12}"
                f"  (off by {100 * line.error:.0f} % over {len(line.points)} sizes)"
            )
        return rows

    def to_dict(self) -> dict[str, object]:
        lines = {
            kind: {
                "alpha_s": line.alpha_s,
                "beta_s": line.beta_s,
                "gap_s": line.gap_s,
                "error": line.error,
                "points": line.points,
            }
            for kind, line in self.lines.items()
        }
        return {
            "kind": "measured",
            "ranks": self.size,
            "cpu_s_per_byte": self.cpu_s_per_byte,
            "post_s": self.post_s,
            "lines": lines,
        }


@dataclass(frozen=True)
class Given:
    """A network that is not there.

    Args:
        size: ranks.
        bandwidth: bits per second, each way, of the link of one node (of one rank, where a node is one rank).
        latency_s: of one message.
        per_node: ranks that share a node's link.
        node_bandwidth: bits per second between ranks of a node.
        topology: how collectives are built; see the module.
    """

    size: int
    bandwidth: float
    latency_s: float = 20e-6
    per_node: int = 1
    node_bandwidth: float = field(default=math.inf)
    topology: Topology = "flat"

    cpu_s_per_byte = post_s = 0.0

    def __post_init__(self) -> None:
        if self.size < 2:
            raise ConfigError(f"{self.size} ranks have nothing to send; --ranks is 2 or more")
        if self.per_node < 1 or self.size % self.per_node:
            raise ConfigError(f"{self.size} ranks cannot stand {self.per_node} to a node; one must divide the other")

    @property
    def nodes(self) -> int:
        return self.size // self.per_node

    def cost(self, kind: str, nbytes: float) -> Cost:
        return Cost(0.0, self._rounds(kind) * self.latency_s + self._transfer(kind, nbytes))

    def _rounds(self, kind: str) -> int:
        """Messages one after the other."""
        n, inner, outer = self.size, self.per_node - 1, self.nodes - 1
        depth = math.ceil(math.log2(n))
        if self.topology == "two-stage":
            return {"all_reduce": 2, "broadcast": depth}.get(kind, 1)
        hops = n - 1 if self.topology == "flat" else inner + outer
        return {"all_reduce": 2 * hops, "broadcast": depth, "exchange": 1}.get(kind, hops)

    def _transfer(self, kind: str, nbytes: float) -> float:
        """Seconds on the busier of the link between nodes and the one inside."""
        n, g = self.size, self.per_node
        outside, inside = 8 / self.bandwidth, 8 / self.node_bandwidth
        own = sent_bytes(kind, nbytes, n)
        if self.nodes == 1:
            return own * inside
        if kind == "all_to_all":  # nothing is shared: all ranks of a node send over its link
            return max(g * nbytes * (n - g) / n * outside, nbytes * (g - 1) / n * inside)
        if kind == "broadcast":
            return nbytes * max(outside, inside if g > 1 else 0.0)
        if self.topology == "hierarchical" and kind == "all_reduce":
            around = 2 * (self.nodes - 1) / self.nodes * nbytes
            return around * outside + 2 * (g - 1) / g * nbytes * inside
        if self.topology == "hierarchical" and kind == "all_gather":
            return (self.nodes - 1) * g * nbytes * outside + (n - 1) * nbytes * inside
        if self.topology == "two-stage":  # every rank reaches out of its node by itself
            part = (n - g) / max(1, n - 1)
            return max(g * own * part * outside, own * (1 - part) * inside)
        return own * max(outside, inside if g > 1 else 0.0)  # a ring crosses each link once

    def describe(self) -> list[str]:
        text = f"network: {self.size} ranks, {rate_text(self.bandwidth)} and {1e6 * self.latency_s:g} us per message"
        if self.per_node > 1:
            inside = "unlimited" if math.isinf(self.node_bandwidth) else rate_text(self.node_bandwidth)
            text += f" between {self.nodes} nodes of {self.per_node} ranks ({inside} inside)"
        return [f"{text}; given, not measured; {self.topology} collectives"]

    def to_dict(self) -> dict[str, object]:
        return {
            "kind": "given",
            "ranks": self.size,
            "bandwidth": self.bandwidth,
            "latency_s": self.latency_s,
            "per_node": self.per_node,
            "node_bandwidth": None if math.isinf(self.node_bandwidth) else self.node_bandwidth,
            "topology": self.topology,
        }


def rate_text(bits: float) -> str:
    """2.5e10 -> 25 Gb/s."""
    unit = next((u for u in ("t", "g", "m", "k") if bits >= _BITS[u]), "")
    return f"{bits / _BITS[unit]:.4g} {unit.upper() if unit != 'k' else 'k'}b/s"
