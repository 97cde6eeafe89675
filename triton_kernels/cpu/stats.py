"""Numba kernel of the whole-tensor statistics; contract in ops/stats.py."""

from __future__ import annotations

import numpy as np
from numba import float32, int32

from . import _tile
from ._arrays import floats
from ._jit import jit
from ._tile import (
    TILE,
    as_it_is,
    compensate,
    finite_bits,
    float_of,
    load,
    max_magnitude_bits,
    memory_of,
    sums,
)


@jit()
def _stats(x, kind, numel, r_at, updated_at, alpha64, decay64, sent64, out):
    r, _, alpha, _, _ = memory_of(numel, r_at, updated_at, alpha64, decay64, sent64)
    result = floats(out, 3)
    buffer, given = np.empty(TILE, np.float32), as_it_is(x, kind, numel, 0, r_at != 0)
    largest, magnitudes, squares = int32(0), 0.0, 0.0
    for start in range(0, numel, TILE):
        count = min(TILE, numel - start)
        p = given[start : start + count] if given.size else buffer
        if not given.size:
            load(x, kind, start, count, p)
        if r_at:
            compensate(p, p, r, start, count, alpha, alpha)
        largest = max(largest, max_magnitude_bits(p, count))
        tile = sums(p, count)
        magnitudes += tile[0]
        squares += tile[1]
    finite = finite_bits(largest)
    result[0] = float_of(largest) if finite else float32(np.nan)
    result[1] = float32(magnitudes) if finite else float32(np.nan)
    result[2] = float32(squares) if finite else float32(np.nan)


def stats(x, memory, out):
    x = x.contiguous()
    _stats(*_tile.source(x), x.numel(), *_tile.factors(memory), out.data_ptr())
