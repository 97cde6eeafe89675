"""The quick form of `scalecom-volume`: what it measured agrees with the formulas, on the transport and on the wire."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("matplotlib", reason="the experiments draw")

from launch.experiments.scalecom import volume as scalecom_volume  # noqa: E402
from launch.lab import netlab  # noqa: E402
from tests.experiments.quick import run_quick  # noqa: E402

D = scalecom_volume.LOCAL
K = -(-D // 100)
INDEX_BITS = 32 * -(-K * 7 // 32)  # 7 bits tell 100 places apart


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, list[dict[str, Any]], Path]:
    """(last line printed, records, folder)."""
    out = tmp_path_factory.mktemp("volume")
    headline, runs = run_quick("scalecom-volume", out)
    return headline, runs, out


def local(runs: list[dict[str, Any]], scheme: str, key: str = "payload") -> dict[int, float]:
    return {run["n"]: run[key] for run in runs if run["part"] == "local" and run["scheme"] == scheme}


@pytest.mark.nightly
def test_clt_k_sends_the_same_part_of_dense_at_every_n(result: tuple[str, list[dict[str, Any]], Path]) -> None:
    dense, sparse = local(result[1], "none"), local(result[1], "scalecom")
    assert sorted(sparse) == [2, 4, 8]
    for n, sent in sparse.items():
        assert sent == pytest.approx((n - 1) / n * (INDEX_BITS + 64 * K) / D, rel=1e-9)
        assert dense[n] / sent == pytest.approx(dense[2] / sparse[2], rel=1e-9)
    assert list(local(result[1], "scalecom", "places").values()) == pytest.approx([1] * 3, rel=1e-3)


@pytest.mark.nightly
def test_local_top_k_grows_with_n_in_bytes_and_in_places(result: tuple[str, list[dict[str, Any]], Path]) -> None:
    sent, places = local(result[1], "topk"), local(result[1], "topk", "places")
    for n in sent:
        assert sent[n] == pytest.approx((n - 1) * 64 * K / D, rel=1e-3)
    assert places[2] > 1.5 and places[8] > 2 * places[2] and places[8] <= 8


@pytest.mark.nightly
def test_bf16_values_halve_the_all_reduce(result: tuple[str, list[dict[str, Any]], Path]) -> None:
    for n, sent in local(result[1], "scalecom, bf16 values").items():
        assert sent == pytest.approx((n - 1) / n * (INDEX_BITS + 32 * K) / D, rel=0.02)


@pytest.mark.nightly
@pytest.mark.skipif(netlab.available() is not None, reason=f"no network laboratory here: {netlab.available()}")
def test_the_interface_sends_and_receives_what_the_transport_counts(
    result: tuple[str, list[dict[str, Any]], Path],
) -> None:
    measured = {run["scheme"]: run for run in result[1] if run["part"] == "interface"}
    assert measured.keys() == scalecom_volume.SCHEMES.keys()
    for scheme, run in measured.items():
        assert run["payload"] == pytest.approx(local(result[1], scheme)[run["n"]], rel=0.01)
        for way in ("sent", "received"):  # headers and Gloo's own messages come on top: some kilobytes a step
            assert run["payload"] < run[way] < 1.05 * run["payload"] + 8 * 10_000 / scalecom_volume.WIRE_QUICK


@pytest.mark.nightly
def test_it_ends_with_a_headline_a_picture_and_a_table(result: tuple[str, list[dict[str, Any]], Path]) -> None:
    headline, _, out = result
    assert headline.startswith("bits sent a step and value, n = 2 -> 8: scalecom 0.355 -> 0.621, topk 0.64 -> 4.48")
    assert (out / "scalecom-volume.png").stat().st_size > 5000
    assert "| n | none | topk |" in (out / "scalecom-volume.md").read_text()


def test_without_root_the_interface_is_left_out_and_the_table_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(netlab, "available", lambda: "network namespaces need root")
    monkeypatch.setattr(scalecom_volume, "LOCAL", 1 << 14)
    headline = scalecom_volume.run(tmp_path, quick=True)
    assert "bytes from the interface are not measured: network namespaces need root" in capsys.readouterr().out
    assert headline.endswith("interface not measured")
    assert "not measured: network namespaces need root" in (tmp_path / "scalecom-volume.md").read_text()
