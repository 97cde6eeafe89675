"""What the kernels of the hot path compile to, held without a GPU: widths of accesses, no spills, instructions."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from compression_plugins.bench import __main__ as bench
from compression_plugins.bench import static

TABLE = Path(__file__).parents[2] / "docs" / "benchmarks" / "gpu.md"
TARGET, SIZE = "sm_90", "1,048,576"
GROWTH = 1.1
AIM = 1.6  # issue bound from which memory is the limit


@pytest.fixture(scope="module")
def compiled(tmp_path_factory) -> dict:
    """Of a process of its own: this one runs the interpreter. Nothing is taken from Triton's cache."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    command = [sys.executable, "-m", "tests.kernels.static_rows", TARGET]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


def published() -> dict[tuple[str, str], float]:
    """Instructions an element of the document, by kernel and setting."""
    section = TABLE.read_text(encoding="utf-8").partition(f"\n{TARGET}, ")[2].partition("\n\nsm_")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in section.splitlines() if "|" in line]
    found = {}
    for row in rows:
        cells = dict(zip(static.HEAD, row, strict=True))
        if cells["size"] == SIZE:
            found[cells["kernel"], cells["setting"]] = float(cells["instr/elt"])
    return found


@pytest.mark.nightly
def test_dense_vectors_are_accessed_128_bits_at_a_time(compiled):
    for row in compiled["rows"]:
        memory, decodes = "memory" in row["setting"], not row["kernel"].endswith("encode")
        loads, stores = (0, 4) if decodes else (4 + 4 * memory, 4 * memory)
        assert row["loads"].get("128", 0) >= loads, row
        assert row["stores"].get("128", 0) >= stores, row
        narrow = sum(amount for width in ("loads", "stores") for bits, amount in row[width].items() if bits != "128")
        assert narrow <= row["bytes"] - loads - stores + 1.1, row  # codes, and scales for each thread
    chunks = compiled["chunk 100"]
    assert chunks["loads"] == {"128": chunks["loads"]["128"]} and chunks["stores"]["128"] and chunks["registers"] < 128


@pytest.mark.nightly
def test_nothing_spills_and_memory_is_what_limits(compiled):
    assert not compiled["chunk 100"]["spills"]
    for row in compiled["rows"]:
        assert not row["spills"] and row["issue_bound"] >= AIM, row


@pytest.mark.nightly
def test_instructions_are_those_of_the_document_or_fewer(compiled):
    expected = published()
    for row in compiled["rows"]:
        assert row["instructions"] <= GROWTH * expected[row["kernel"], row["setting"]], row


def test_data_and_routines_of_rare_operands_are_no_instructions():
    text = """
.text._kernel:
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/              @!P1 BRA `(.L_x_1) ;
.L_x_0:
        /*0020*/                   DADD R2, R2, R4 ;
        /*0030*/               @P0 BRA `(.L_x_0) ;
.L_x_1:
        /*0040*/                   EXIT ;
.L_x_2:
        /*0050*/                   BRA `(.L_x_2);
        /*0060*/                   NOP;
        /*0070*/ .byte 0x12
"""
    assert static._operations(text) == ["LDC", "BRA", "DADD", "BRA", "EXIT", "BRA"]
    assert static._loops(text) == 1


def test_an_unknown_target_is_one_line(capsys):
    assert bench.main(["kernels", "--static", "sm_7"]) == 2
    assert "no target 'sm_7': give one of sm_80" in capsys.readouterr().err


def test_the_interpreter_is_refused(capsys, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert bench.main(["kernels", "--static", TARGET]) == 2
    assert "TRITON_INTERPRET is set" in capsys.readouterr().err
