"""The benchmark runs every kernel and reports what it promises; speed itself is never asserted."""

from __future__ import annotations

import json

import pytest
import torch

from compression_plugins.bench import __main__ as bench
from compression_plugins.bench import kernels, timing
from compression_plugins.schemes import registry
from compression_plugins.triton_kernels import ops

COLUMNS = {
    "machine", "device", "date", "torch", "triton", "numba", "numpy", "numel", "kernel", "setting",
    "implementation", "bytes", "copy_bytes_per_s", "ms",
    "bound_ms", "ratio", "eager_ms", "compiled_ms", "compiled_skipped", "packbits_ms",
}  # fmt: skip


def run(capsys, *arguments: str) -> str:
    assert bench.main(["kernels", "--device", "cpu", "--repeats", "1", *arguments]) == 0
    return capsys.readouterr().out


def test_every_kernel_has_a_row_with_every_column(capsys, tmp_path):
    path = tmp_path / "rows.jsonl"
    text = run(capsys, "--numel", "3001", "--no-compile", "--json", str(path))
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert {row["kernel"] for row in rows} == set(ops.FAMILY_OF)
    for row in rows:
        assert set(row) == COLUMNS
        assert row["numel"] == 3001 and row["implementation"] == "cpu" and row["machine"]
        assert row["ms"] > 0 and row["eager_ms"] > 0 and row["ratio"] == pytest.approx(row["ms"] / row["bound_ms"])
        assert row["kernel"] in text and row["compiled_skipped"] == "not asked for"
    assert len({(row["kernel"], row["setting"]) for row in rows}) == len(rows)
    packed = {row["kernel"] for row in rows if row["packbits_ms"]}
    assert packed == {"sign_encode", "sign_bits", "signs_expand"}
    assert f"Numba compiles for {timing.vector_unit()}" in text


def test_bytes_of_a_row_are_the_published_bound(capsys):
    """Bytes an element, fp32: K1 12 + b/8 (4 + b/8 without memory) and the scales, K4 12 + 8/C, K6 3/8."""
    numel = 512 * 112 * 8
    bound = {(c.kernel, c.setting): c.bytes / numel for c in kernels.cases(numel, torch.device("cpu"))}
    assert bound["sign_encode", "block 512, memory"] == pytest.approx(12 + 1 / 8 + 4 / 512)
    assert bound["uniform_encode", "4 bit, block 512"] == pytest.approx(4 + 4 / 8 + 4 / 512)
    assert bound["chunk_select", "chunk 112, memory"] == pytest.approx(12 + 8 / 112)
    assert bound["bit_merge", "3 ranks and 1"] == pytest.approx(3 / 8)
    assert bound["signs_expand", "bare, memory"] == pytest.approx(12 + 1 / 8)


def test_failed_compilation_is_reported_with_its_reason(capsys, monkeypatch):
    def refuse(function, **_):
        def call(*args, **kwargs):
            raise RuntimeError("no working C++ compiler found\nsecond line")

        return call

    monkeypatch.setattr(torch, "compile", refuse)
    text = run(capsys, "--numel", "64", "--only", "stats")
    assert "not compiled (2 rows): RuntimeError: no working C++ compiler found" in text and "second line" not in text


def test_compiled_reference_is_timed(capsys, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    assert "not compiled" not in run(capsys, "--numel", "64", "--only", "sign_bits", "--only", "stat*")


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--only", "nothing"], "no kernel matches nothing"),
        (["--numel", "0"], "numel"),
        (["--repeats", "0"], "repeats"),
    ],
)
def test_mistakes_are_one_line_and_status_2(capsys, arguments, words):
    assert bench.main(["kernels", "--device", "cpu", *arguments]) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a CUDA device")
def test_missing_device_is_refused(capsys):
    assert bench.main(["kernels", "--device", "cuda"]) == 2
    assert "no CUDA device" in capsys.readouterr().err


def test_threads_are_restored(capsys):
    before = torch.get_num_threads()
    run(capsys, "--numel", "64", "--only", "sign_bits", "--no-compile")
    assert torch.get_num_threads() == before


def test_every_scheme_has_a_row_beside_bf16(capsys, tmp_path):
    path = tmp_path / "rows.jsonl"
    assert bench.main(["schemes", "--device", "cpu", "--numel", "4096", "--steps", "2", "--json", str(path)]) == 0
    rows = {row["scheme"]: row for row in map(json.loads, path.read_text().splitlines())}
    assert list(rows) == registry.names() and rows["bf16"]["time_vs_bf16"] == 1
    text = capsys.readouterr().out
    assert all(f"\n{name} " in text for name in rows) and rows["none"]["ratio"] == 1
    assert rows["none"]["vnmse"] < 1e-12 < rows["qsgd"]["bias"] < rows["qsgd"]["vnmse"]
    assert all(row["milliseconds"] > 0 and row["machine"] and row["date"] for row in rows.values())


def test_an_unknown_scheme_is_one_line(capsys):
    assert bench.main(["schemes", "--schemes", "scalecm", "--numel", "64"]) == 2
    assert "did you mean 'scalecom'" in capsys.readouterr().err
