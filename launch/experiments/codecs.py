"""What codecs cost on this machine: kernels against the bytes that they must move, schemes against bf16."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

import torch

from compression_plugins.bench import kernels as bench_kernels
from compression_plugins.bench import schemes as bench_schemes
from compression_plugins.bench.timing import copy_rate, one_thread
from launch.document import COLOURS, Table

from .study import Study, drawing

DESCRIPTION = "Kernels against the bytes they must move, eager, torch.compile and NumPy; schemes against bf16"
#: Ranks of the table of schemes, and the elements of its bucket.
RANKS, NUMEL = (2, 8), 1 << 20


def run(out: Path, quick: bool) -> str:
    """Measure on one thread; write records, picture, tables and page; return the headline."""
    numel, repeats = (1 << 16, 3) if quick else (bench_kernels.BUCKET, 9)
    device = torch.device("cpu")
    cases = list(bench_kernels.cases(numel, device))
    if quick:
        cases = [case for case in cases if case.kernel in ("sign_encode", "sign_decode")]
    with one_thread(), Study("codecs", out, len(cases) + len(RANKS)) as study:
        kernels = []
        for case in cases:
            kernels.append(bench_kernels.measure(case, numel, device, repeats, compiled=not quick))
            study.record(f"{case.kernel} {case.setting}", part="kernel", **kernels[-1])
        schemes = {}
        for ranks in RANKS:
            schemes[ranks] = bench_schemes.measure(numel=NUMEL >> 4 if quick else NUMEL, ranks=ranks)
            study.record(
                f"schemes on {ranks} ranks", part="schemes", rows=json.dumps([asdict(r) for r in schemes[ranks]])
            )
        rate = copy_rate(numel, device, repeats)
        notes = [
            f"{numel:,} fp32 values, one thread, medians of {repeats}; × bound: against a copy of as many bytes as the "
            f"kernel must read and write, timed beside it ({rate / 1e9:.1f} GB/s, read plus written). eager: the "
            "reference in plain PyTorch that tests compare with, written to be read; compiled: the same under "
            "torch.compile; packbits: NumPy, packing alone.",
            f"Schemes: one bucket of {NUMEL:,} values, ranks of one process, one rank's encoding, averaging and "
            "decoding. vNMSE: squared error of one step's average by the squared mean gradient; bias: the same "
            "of the mean over ten steps with one and the same gradient.",
        ]
        title = "What codecs cost on a CPU"
        tables = [_kernels(kernels), *(_schemes(rows, ranks) for ranks, rows in schemes.items())]
        return study.finish(title, tables, _picture(schemes[RANKS[0]]), notes, _headline(kernels))


def _kernels(rows: list[dict[str, Any]]) -> Table:
    def cell(value: float | None) -> str:
        return "–" if value is None else f"{value:.3g}"

    columns = ("ms", "ratio", "eager_ms", "compiled_ms", "packbits_ms")
    headers = ["kernel", "setting", "ms", "× bound", "eager, ms", "compiled, ms", "packbits, ms"]
    return Table(headers, [[r["kernel"], r["setting"], *(cell(r[c]) for c in columns)] for r in rows], left=2)


def _schemes(rows: list[bench_schemes.SchemeRow], ranks: int) -> Table:
    headers = [
        f"scheme, {ranks} ranks",
        "bits sent a value",
        "times fewer",
        "ms",
        "× bf16",
        "vNMSE",
        "bias",
        "state, B a value",
    ]
    return Table(
        headers,
        [
            [r.scheme, *(f"{x:.3g}" for x in (r.bits_per_value, r.ratio, r.milliseconds, r.time_vs_bf16)),
             *(f"{x:.2g}" for x in (r.vnmse, r.bias)), f"{r.state_bytes_per_value:.2g}"]
            for r in rows
        ],
    )  # fmt: skip


def _picture(rows: list[bench_schemes.SchemeRow]) -> Any:
    figure, (axes,) = drawing(width=8, height=4.6)
    for spot, colour in zip(_spots(rows), COLOURS * 3):
        bits, milliseconds = spot[0].bits_per_value, spot[0].milliseconds
        crowded = any(1 < r.bits_per_value / bits < 1.5 and _near(r.milliseconds, milliseconds, 0.2) for r in rows)
        axes.plot([r.bits_per_value for r in spot], [r.milliseconds for r in spot], "o", color=colour)
        axes.annotate(
            "\n".join(r.scheme for r in spot),
            (bits, milliseconds),
            (-6 if crowded else 6, 3),
            textcoords="offset points",
            ha="right" if crowded else "left",
            fontsize=8,
        )
    axes.set(xscale="log", yscale="log", xlabel="bits sent a value", ylabel=f"time of one rank on {NUMEL:,} values, ms")
    axes.margins(x=0.1)
    return figure


def _spots(rows: list[bench_schemes.SchemeRow]) -> list[list[bench_schemes.SchemeRow]]:
    """Schemes whose points touch share a label."""
    spots: list[list[bench_schemes.SchemeRow]] = []
    for row in rows:
        for spot in spots:
            if _near(row.bits_per_value, spot[0].bits_per_value) and _near(row.milliseconds, spot[0].milliseconds):
                spot.append(row)
                break
        else:
            spots.append([row])
    return spots


def _near(a: float, b: float, tolerance: float = 0.1) -> bool:
    return abs(a - b) < tolerance * b


def _headline(rows: list[dict[str, Any]]) -> str:
    text = f"kernels on one thread: median {median(r['ratio'] for r in rows):.2g}x of the bytes bound"
    compiled = [r["compiled_ms"] / r["ms"] for r in rows if r["compiled_ms"]]
    return text + (f", {median(compiled):.2g}x faster than torch.compile of the reference" if compiled else "")
