"""Past any one machine: volume and step time for n = 2 ... 4096 from the alpha-beta model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import get_args

from ..config import Config
from ..engine.plan import make_plan
from ..errors import UnsupportedError
from .compute import Compute
from .network import Given, Topology
from .predict import step
from .simulate import Host, Machine
from .work import Codecs

RANKS = tuple(2**i for i in range(1, 13))
TOPOLOGIES: tuple[Topology, ...] = get_args(Topology)


@dataclass(frozen=True)
class Point:
    """One scheme on `ranks` ranks.

    Attributes:
        sent_bytes: by one rank, per step.
        step_s, codec_s, exposed_s: see `predict.Step`.
    """

    scheme: str
    topology: Topology
    ranks: int
    sent_bytes: float
    step_s: float
    codec_s: float
    exposed_s: float


def volumes(configs: dict[str, Config], compute: Compute, ranks: Sequence[int] = RANKS) -> list[tuple[str, int, float]]:
    """(label, ranks, bytes sent by a rank in a step), from `Bucket.wire_bytes` alone; dense tensors are in it."""
    rows = []
    for label, config in configs.items():
        buckets = make_plan(config, compute.specs).buckets
        for n in _able(config, ranks):
            rows.append((label, n, sum(bucket.wire_bytes(n) for bucket in buckets)))
    return rows


def sweep(
    configs: dict[str, Config],
    compute: Compute,
    codecs: Codecs,
    bandwidth: float,
    latency_s: float,
    per_node: int = 8,
    node_bandwidth: float = float("inf"),
    ranks: Sequence[int] = RANKS,
    topologies: Sequence[Topology] = TOPOLOGIES,
    machine: Machine | None = None,
    host: Host = "horovod",
) -> list[Point]:
    """A point for each scheme, topology and number of ranks that the scheme can run on.

    With `hierarchical`, nodes have `per_node` ranks (all of them, where there are fewer) and share one link; with the
    other two every rank is a node, so that the bytes on a link are a rank's own.
    """
    points = []
    for topology in topologies:
        for n in ranks:
            together = min(per_node, n) if topology == "hierarchical" else 1
            network = Given(n, bandwidth, latency_s, together, node_bandwidth, topology)
            for label, config in configs.items():
                if n not in _able(config, [n]):
                    continue
                one = step(config, compute, network, codecs.on(n), host, machine, codecs.model_side)
                points.append(Point(label, topology, n, one.sent_bytes, one.step_s, one.codec_s, one.exposed_s))
    return points


def dense_seconds(numel: int, network: Given) -> float:
    """An fp32 all-reduce of `numel` values, alone on the network: the closed form of each topology."""
    return sum(network.cost("all_reduce", 4 * numel))


def _able(config: Config, ranks: Sequence[int]) -> list[int]:
    able = []
    for n in ranks:
        try:
            config.check_ranks(n)
        except UnsupportedError:
            continue
        able.append(n)
    return able
