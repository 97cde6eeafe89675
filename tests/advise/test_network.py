"""Fits against known lines, closed forms against sums by hand."""

from __future__ import annotations

import random

import pytest

from compression_plugins.advise.network import Given, Line, Measured, fit, parse_bytes_rate, parse_rate, parse_time
from compression_plugins.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "bits"), [("25Gb", 25e9), ("100mbit", 1e8), ("1gbit", 1e9), ("10Gbps", 1e10), ("2.5 Gbit/s", 2.5e9)]
)
def test_a_bandwidth_is_in_bits(text: str, bits: float) -> None:
    assert parse_rate(text) == bits


@pytest.mark.parametrize("text", ["25GB", "25", "Gb", "-1Gb", "0Gb", "1e9b", "25 giga", "12mbps", "1gbps", "3MB/s"])
def test_what_could_be_bytes_or_nothing_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="bandwidth"):
        parse_rate(text)


def test_a_latency_has_a_unit() -> None:
    assert parse_time("20us") == pytest.approx(20e-6) and parse_time("0s") == 0
    for text in ("20", "20m", "us", "-1us"):
        with pytest.raises(ConfigError, match="latency"):
            parse_time(text)


def test_memory_bandwidth_is_in_bytes() -> None:
    assert parse_bytes_rate("2TB") == 2e12 and parse_bytes_rate("900GB/s") == 9e11
    with pytest.raises(ConfigError, match="memory bandwidth"):
        parse_bytes_rate("900Gb")


def test_the_fit_recovers_latency_and_rate() -> None:
    noise = random.Random(0)
    sizes = [4096 * 4**i for i in range(7)]
    exact = fit([(x, 1e-3 + 8e-9 * x) for x in sizes])
    assert (exact.alpha_s, exact.beta_s) == (pytest.approx(1e-3), pytest.approx(8e-9))
    assert exact.error == pytest.approx(0, abs=1e-9)
    rough = fit([(x, (1e-3 + 8e-9 * x) * noise.uniform(0.95, 1.05)) for x in sizes])
    assert (rough.alpha_s, rough.beta_s) == (pytest.approx(1e-3, rel=0.06), pytest.approx(8e-9, rel=0.06))


def test_neither_part_of_a_fit_is_negative() -> None:
    free = fit([(1e3, 1e-3), (1e6, 0.9e-3)])
    assert free.beta_s == 0 and free.alpha_s > 0
    no_latency = fit([(1e3, 1e-7), (1e6, 1e-3)])
    assert no_latency.alpha_s == 0 and no_latency.beta_s > 0


def test_a_measured_collective_is_its_own_line() -> None:
    network = Measured(4, {"all_gather": Line(alpha_s=1e-3, beta_s=1e-8, gap_s=2e-4)})
    latency, busy = network.cost("all_gather", 1000)
    assert (latency, busy) == (pytest.approx(8e-4), pytest.approx(2e-4 + 3 * 1000 * 1e-8))


def test_between_measured_sizes_times_are_interpolated_and_beyond_them_as_steep_as_before() -> None:
    line = fit([(1e3, 1.0), (2e3, 1.0), (4e3, 5.0)])  # a buffer, then the link
    assert [line.seconds(x) for x in (0.0, 1500.0, 3e3, 5e3)] == pytest.approx([1.0, 1.0, 3.0, 7.0])
    assert line.faster(2.0).seconds(3e3) == pytest.approx(2.0)


def test_a_larger_message_never_takes_less_time() -> None:
    line = fit([(1e3, 3e-3), (4e3, 1e-3), (16e3, 9e-3)])
    assert [t for _, t in line.points] == pytest.approx([2e-3, 2e-3, 9e-3])


B, A, M = 8e9, 1e-5, 1e6  # 1 ns a byte


def cost(kind: str, nbytes: float, **network: object) -> float:
    return sum(Given(bandwidth=B, latency_s=A, **network).cost(kind, nbytes))  # type: ignore[arg-type]


def test_a_flat_ring() -> None:
    assert cost("all_reduce", M, size=4) == pytest.approx(6 * A + 1.5 * M * 1e-9)
    assert cost("all_gather", M, size=4) == pytest.approx(3 * A + 3 * M * 1e-9)
    assert cost("all_to_all", M, size=4) == pytest.approx(3 * A + 0.75 * M * 1e-9)
    assert cost("exchange", M, size=4) == pytest.approx(A + M * 1e-9)
    assert cost("broadcast", M, size=4) == pytest.approx(2 * A + M * 1e-9)


def test_everybody_to_everybody_takes_two_rounds() -> None:
    assert cost("all_reduce", M, size=64, topology="two-stage") == pytest.approx(2 * A + 2 * 63 / 64 * M * 1e-9)
    assert cost("all_gather", M, size=64, topology="two-stage") == pytest.approx(A + 63 * M * 1e-9)


def test_nodes_share_one_link_and_have_fewer_hops() -> None:
    nodes = {"size": 8, "per_node": 4, "node_bandwidth": 10 * B, "topology": "hierarchical"}
    inside, outside = 1e-10, 1e-9
    assert cost("all_reduce", M, **nodes) == pytest.approx(2 * (3 + 1) * A + M * (1.0 * outside + 1.5 * inside))
    assert cost("all_gather", M, **nodes) == pytest.approx((3 + 1) * A + M * (4 * outside + 7 * inside))
    assert cost("all_to_all", M, **nodes) == pytest.approx((3 + 1) * A + 4 * M / 2 * outside)  # four ranks, one link


def test_one_node_never_uses_the_link_between_nodes() -> None:
    only = Given(4, B, 0.0, 4, 100 * B, "hierarchical")
    assert only.cost("all_reduce", M).busy_s == pytest.approx(1.5 * M * 1e-11)


@pytest.mark.parametrize(("size", "per_node"), [(1, 1), (8, 3), (8, 0)])
def test_impossible_clusters_are_refused(size: int, per_node: int) -> None:
    with pytest.raises(ConfigError):
        Given(size, B, A, per_node)
