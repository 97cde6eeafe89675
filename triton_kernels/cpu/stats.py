"""Numba kernel of the whole-tensor statistics; contract in ops/stats.py."""

from __future__ import annotations

import numpy as np
from numba import float32, int32

from . import _tile
from ._arrays import floats
from ._jit import jit
from ._tile import (
    TILE,
    compensate,
    finite_bits,
    float_of,
    load,
    max_magnitude_bits,
    memory_of,
    sum_abs,
    sum_squares,
)


@jit()
def _stats(x, kind, numel, r_at, updated_at, alpha64, decay64, sent64, out):
    r, _, alpha, _, _ = memory_of(numel, r_at, updated_at, alpha64, decay64, sent64)
    result = floats(out, 3)
    p = np.empty(TILE, np.float32)
    largest, magnitudes, squares = int32(0), 0.0, 0.0
    for start in range(0, numel, TILE):
        count = min(TILE, numel - start)
        load(x, kind, start, count, p)
        if r_at:
            compensate(p, p, r, start, count, alpha, alpha)
        largest = max(largest, max_magnitude_bits(p, count))
        magnitudes += sum_abs(p, count)
        squares += sum_squares(p, count)
    finite = finite_bits(largest)
    result[0] = float_of(largest) if finite else float32(np.nan)
    result[1] = float32(magnitudes) if finite else float32(np.nan)
    result[2] = float32(squares) if finite else float32(np.nan)


def stats(x, memory, out):
    x = x.contiguous()
    _stats(*_tile.source(x), x.numel(), *_tile.factors(memory), out.data_ptr())
