"""The simulation of many ranks against what is known of volumes and rings."""

from __future__ import annotations

import pytest

from compression_plugins.advise.compute import from_shapes
from compression_plugins.advise.network import Given
from compression_plugins.advise.scale import RANKS, dense_seconds, sweep, volumes
from compression_plugins.advise.shapes import load
from compression_plugins.advise.work import Codecs
from compression_plugins.config import Config

COMPUTE = from_shapes(load("mlp"), compute_ms=20)


def test_volume_of_a_ring_is_bounded_and_that_of_an_all_gather_grows_with_the_ranks() -> None:
    configs = {name: Config.load(name) for name in ("none", "scalecom", "topk")}
    sent = {(label, n): nbytes for label, n, nbytes in volumes(configs, COMPUTE)}
    assert len(sent) == 3 * len(RANKS)
    assert sent["none", 4096] == pytest.approx(2 * 4095 / 4096 * 4 * COMPUTE.numel)
    assert sent["scalecom", 4096] < 2.05 * sent["scalecom", 2]
    assert sent["topk", 4096] > 1000 * sent["topk", 2]


def test_a_sweep_has_a_point_for_each_topology_and_number_of_ranks_that_can_be() -> None:
    configs = {"none": Config.load("none"), "torus": Config.load({"scheme": "marsit", "form": "torus", "rows": 4})}
    points = sweep(configs, COMPUTE, Codecs(largest=1 << 16), 1e9, 1e-5, ranks=(2, 8), per_node=4)
    assert [(p.scheme, p.topology, p.ranks) for p in points if p.topology == "flat"] == [
        ("none", "flat", 2),
        ("none", "flat", 8),
        ("torus", "flat", 8),
    ]
    assert {p.topology for p in points} == {"flat", "hierarchical", "two-stage"}
    assert all(p.step_s == pytest.approx(0.02 + p.exposed_s) for p in points)


def test_two_stages_beat_rings_only_by_their_latencies() -> None:
    ring, direct = (Given(1024, 1e10, 1e-5, topology=topology) for topology in ("flat", "two-stage"))  # type: ignore[arg-type]
    assert dense_seconds(10**7, ring) - dense_seconds(10**7, direct) == pytest.approx((2 * 1023 - 2) * 1e-5)
