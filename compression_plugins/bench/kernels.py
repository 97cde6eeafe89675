"""Kernels against the bytes they must move, and against what one would write without them.

Every kernel is bound by memory, so its bar is the time that the device needs to move the bytes the kernel must read and
write, at the copy rate measured in the same run: ``x bound`` is 1 for a kernel that cannot get faster (a little less is
possible on a CPU, whose plain copy also reads the lines that it overwrites). Beside it stand the same function in eager
PyTorch (the reference of the tests), under ``torch.compile``, and the packing alone with NumPy or CuPy ``packbits``.
"""

from __future__ import annotations

import collections
import fnmatch
import importlib
import importlib.util
import json
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from .. import triton_kernels as K
from ..errors import ConfigError, UnsupportedError
from ..triton_kernels import dispatch, ops
from .table import aligned
from .timing import copy_rate, machine, median_seconds, one_thread, vector_unit

BUCKET = 25 * 2**20 // 4  # one gradient bucket of 25 MiB
NUMEL = {"cpu": BUCKET, "cuda": 2**26}  # larger than the caches, as gradients are
SLOW_REPEATS = 3  # of the comparisons, some of which take a hundred times longer
BLOCK, CHUNK, RANKS = 512, 112, 4
WIDTH = (CHUNK - 1).bit_length()  # bits of an index inside a chunk


@dataclass(frozen=True)
class Case:
    """One row: ``kernel(*args, **kwargs)`` moves at least ``bytes`` bytes."""

    kernel: str
    setting: str
    bytes: int
    args: tuple
    kwargs: dict[str, Any] = field(default_factory=dict)
    packbits: Callable[[], object] | None = None

    def bind(self, function: Callable) -> Callable[[], object]:
        return lambda: function(*self.args, **self.kwargs)


def cases(numel: int, device: torch.device) -> Iterator[Case]:
    """Every kernel of every family on vectors of ``numel`` fp32 elements."""
    x = torch.randn(numel, generator=torch.Generator().manual_seed(0)).to(device)
    state = torch.zeros_like(x)
    none: dict[str, Any] = {}
    memory = {"residual": state}
    key = K.Key(seed=0, tensor=0, step=0, rank=0)
    dense = x.nbytes
    for kwargs, label in ((none, ""), (memory, ", memory")):
        moved = 3 * dense if kwargs else dense  # x is read; with a memory r is read and written
        payload = K.sign_encode(x, BLOCK)
        pack = None if kwargs else _pack_signs(x)
        yield Case("stats", f"global{label}", 2 * dense if kwargs else dense, (x,), kwargs)
        yield Case("sign_encode", f"block {BLOCK}{label}", moved + payload.nbytes, (x, BLOCK), kwargs, pack)
        for bits in (2, 4, 8):
            payload = K.uniform_encode(x, bits, BLOCK, key)
            setting = f"{bits} bit, block {BLOCK}{label}"
            yield Case("uniform_encode", setting, moved + payload.nbytes, (x, bits, BLOCK, key), kwargs)
        for kind in ("bf16", "fp8"):
            payload = K.cast_encode(x, kind, BLOCK)
            yield Case("cast_encode", f"{kind}{label}", moved + payload.nbytes, (x, kind, BLOCK), kwargs)
        indices, values = K.chunk_select(x, CHUNK)
        sparse = indices.nbytes + values.nbytes
        yield Case("chunk_select", f"chunk {CHUNK}{label}", moved + sparse, (x, CHUNK), kwargs)
        yield Case("chunk_gather", f"chunk {CHUNK}{label}", moved + sparse, (x, indices, CHUNK), kwargs)
        signs = K.sign_bits(x)
        yield Case("sign_bits", f"bare{label}", moved + signs.nbytes, (x,), kwargs, pack)
        yield Case("one_hot_signs", f"{RANKS} ranks{label}", moved + signs.nbytes, (x, 1, RANKS, key), kwargs)
        unpack = None if kwargs else _unpack_signs(signs)
        yield Case("signs_expand", f"bare{label}", moved + signs.nbytes, (signs, numel, 1e-3), kwargs, unpack)
        sizes = [numel - numel // 2, numel // 2]
        each = signs, x.new_full((2,), 1e-3), sizes
        yield Case("signs_expand_each", f"2 parts{label}", moved + signs.nbytes, each, kwargs)
    yield from _decoders(x, state, key)


def _decoders(x: torch.Tensor, param: torch.Tensor, key: K.Key) -> Iterator[Case]:
    numel, dense = x.numel(), x.nbytes
    into = {"out": torch.empty_like(x)}
    sign = K.sign_encode(x, BLOCK)
    yield Case("sign_decode", f"block {BLOCK}", dense + sign.nbytes, (sign, numel, BLOCK), into)
    yield Case("sign_reduce", f"{RANKS} ranks", (RANKS + 1) * sign.nbytes, (sign.repeat(RANKS, 1), numel, BLOCK))
    bits = K.sign_bits(x)
    yield Case("sign_draw", "global", 2 * dense + 4 + bits.nbytes, (x, key))  # x is read twice, first for its norm
    yield Case("sign_vote", f"{RANKS} ranks", (RANKS + 1) * bits.nbytes, (bits.repeat(RANKS, 1), numel))
    yield Case("bit_merge", "3 ranks and 1", 3 * bits.nbytes, (bits, bits.flip(0).contiguous(), 3, 1, key))
    for width in (2, 4, 8):
        payload = K.uniform_encode(x, width, BLOCK, key)
        yield Case("uniform_decode", f"{width} bit", dense + payload.nbytes, (payload, numel, width, BLOCK), into)
    arguments: tuple = (payload.repeat(RANKS, 1), numel, width, BLOCK, key)
    yield Case("uniform_reduce", f"{width} bit, {RANKS} ranks", (RANKS + 1) * payload.nbytes, arguments)
    into_mean = RANKS * payload.nbytes + dense
    yield Case("uniform_average", f"{width} bit, {RANKS} ranks", into_mean, (arguments[0], numel, width, BLOCK), into)
    yield Case("uniform_round", "8 bit", 2 * dense, (x, 8, 4.0, key), into)
    for kind in ("bf16", "fp8"):
        payload = K.cast_encode(x, kind, BLOCK)
        yield Case("cast_decode", kind, dense + payload.nbytes, (payload, numel, kind, BLOCK), into)
        arguments = payload.repeat(RANKS, 1), numel, kind, BLOCK
        yield Case("cast_reduce", f"{kind}, {RANKS} ranks", (RANKS + 1) * payload.nbytes, arguments)
    codes = torch.arange(numel, dtype=torch.int32, device=x.device) % CHUNK
    packed = K.pack_bits(codes, WIDTH)
    yield Case("pack_bits", f"{WIDTH} bit", codes.nbytes + packed.nbytes, (codes, WIDTH))
    yield Case("unpack_bits", f"{WIDTH} bit", codes.nbytes + packed.nbytes, (packed, numel, WIDTH))
    indices, values = K.chunk_select(x, CHUNK)
    indices += CHUNK * torch.arange(indices.numel(), dtype=torch.int32, device=x.device)
    indices.clamp_(max=max(numel - 1, 0))
    yield Case("scatter_add", f"1 in {CHUNK}", indices.nbytes + 3 * values.nbytes, (indices, values, param))


def _pack_signs(x: torch.Tensor) -> Callable[[], object] | None:
    library = _array_library(x)
    if library is None:
        return None
    array = library.from_dlpack(x)
    return lambda: library.packbits(array >= 0, bitorder="little")


def _unpack_signs(bits: torch.Tensor) -> Callable[[], object] | None:
    library = _array_library(bits)
    if library is None:
        return None
    array = library.from_dlpack(bits)
    return lambda: library.unpackbits(array, bitorder="little") * library.float32(2e-3) - library.float32(1e-3)


def _array_library(tensor: torch.Tensor) -> Any:
    """NumPy for CPU tensors; CuPy for CUDA tensors where it is installed."""
    name = "cupy" if tensor.is_cuda else "numpy"
    return importlib.import_module(name) if importlib.util.find_spec(name) else None


def measure(case: Case, numel: int, device: torch.device, repeats: int, compiled: bool) -> dict[str, Any]:
    """One row of the table: times in milliseconds, None where not measured (``compiled_skipped`` says why).

    The copy is timed again beside every kernel, so that the ratio survives a machine whose speed drifts.
    """
    reference = _reference(case.kernel)
    slow = min(repeats, SLOW_REPEATS)
    seconds = median_seconds(case.bind(getattr(K, case.kernel)), device, repeats)
    rate = copy_rate(numel, device, repeats)
    bound = case.bytes / rate
    compiled_ms, skipped = _compiled(case, reference, device, slow) if compiled else (None, "not asked for")
    return {
        "kernel": case.kernel,
        "setting": case.setting,
        "implementation": dispatch.implementation(device),
        "bytes": case.bytes,
        "copy_bytes_per_s": rate,
        "ms": 1e3 * seconds,
        "bound_ms": 1e3 * bound,
        "ratio": seconds / bound,
        "eager_ms": 1e3 * median_seconds(case.bind(reference), device, slow),
        "compiled_ms": compiled_ms,
        "compiled_skipped": skipped,
        "packbits_ms": 1e3 * median_seconds(case.packbits, device, slow) if case.packbits else None,
    }


def _reference(kernel: str) -> Callable:
    front = getattr(K, kernel)

    def call(*args: Any, **kwargs: Any) -> Any:
        with dispatch.running("reference"):
            return front(*args, **kwargs)

    return call


def _compiled(case: Case, reference: Callable, device: torch.device, repeats: int) -> tuple[float | None, str | None]:
    torch.compiler.reset()  # else the limit on recompilations of one function would quietly mean eager
    call = case.bind(torch.compile(reference, dynamic=False))
    try:
        return 1e3 * median_seconds(call, device, repeats), None
    except Exception as error:  # whatever a compiler raises is the answer to this column
        lines = str(error).strip().splitlines() or [""]
        return None, f"{type(error).__name__}: {lines[0]}"


def run(
    device: str, numel: int | None, repeats: int, compiled: bool, only: Sequence[str] = (), path: Path | None = None
) -> list[dict[str, Any]]:
    """Measures, prints the table, and writes one JSON object a row to ``path``.

    Raises:
        UnsupportedError: the device is not there.
        ConfigError: no kernel matches ``only``, or a number is out of range.
    """
    target = torch.device(device)
    if target.type == "cuda" and not torch.cuda.is_available():
        raise UnsupportedError("no CUDA device is available: use --device cpu")
    numel = NUMEL[target.type] if numel is None else numel
    if numel < 1 or repeats < 1:
        raise ConfigError(f"numel and repeats must be at least 1, got {numel} and {repeats}")
    names = matching(only)
    about = machine(target) | {"numel": numel}
    with one_thread():
        chosen = (case for case in cases(numel, target) if case.kernel in names)
        rows = [about | measure(case, numel, target, repeats, compiled) for case in chosen]
    print(table(rows))
    if path is not None:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return rows


def matching(patterns: Sequence[str]) -> set[str]:
    """Names of the kernels that a pattern matches; all of them for no pattern."""
    names = {name for pattern in patterns or ["*"] for name in fnmatch.filter(ops.FAMILY_OF, pattern)}
    if not names:
        raise ConfigError(f"no kernel matches {', '.join(patterns)}; kernels: {', '.join(ops.FAMILY_OF)}")
    return names


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Aligned plain text: the machine, one line a kernel, then why comparisons are missing."""
    about, rate = rows[0], statistics.median(row["copy_bytes_per_s"] for row in rows)
    versions = ", ".join(f"{name} {about[name]}" for name in ("torch", "triton", "numba"))
    threads = ", one thread" if about["device"] == "cpu" else ""
    cells = [("kernel", "setting", "B/elt", "ms", "x bound", "eager ms", "compiled ms", "packbits ms")]
    for row in rows:
        numbers = (_number(row[name]) for name in ("ms", "ratio", "eager_ms", "compiled_ms", "packbits_ms"))
        cells.append((row["kernel"], row["setting"], f"{row['bytes'] / row['numel']:.3f}", *numbers))
    lines = [
        f"{about['machine']}, {about['date']}, {versions}",
        *([f"Numba compiles for {vector_unit()}"] if about["implementation"] == "cpu" else []),
        f"{about['numel']:,} fp32 elements, copy {rate / 1e9:.1f} GB/s{threads}",
        "",
    ]
    lines += aligned(cells, words=(0, 1))
    reasons = collections.Counter(row["compiled_skipped"] for row in rows if row["compiled_skipped"])
    return "\n".join(lines + [f"\nnot compiled ({count} rows): {reason}" for reason, count in reasons.items()])


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}" if value < 10 else f"{value:.1f}"
