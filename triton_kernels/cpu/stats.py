"""Numba kernel of the whole-tensor statistics (K0); contract in reference/stats.py."""

from __future__ import annotations

import numpy as np
import torch
from numba import float32, int32

from ..layout import Memory, check_input
from . import _tile
from ._jit import jit
from ._tile import TILE, compensate, finite_bits, float_of, load, max_magnitude_bits, sum_abs, sum_squares


@jit()
def _stats(x32, x16, kind, numel, r, has_r, alpha, decay, sent, out):
    p = np.empty(TILE, np.float32)
    largest, magnitudes, squares = int32(0), 0.0, 0.0
    for start in range(0, numel, TILE):
        count = min(TILE, numel - start)
        load(x32, x16, kind, start, count, p)
        if has_r:
            compensate(p, p, r, start, count, alpha, alpha)
        largest = max(largest, max_magnitude_bits(p, count))
        magnitudes += sum_abs(p, count)
        squares += sum_squares(p, count)
    finite = finite_bits(largest)
    out[0] = float_of(largest) if finite else float32(np.nan)
    out[1] = float32(magnitudes) if finite else float32(np.nan)
    out[2] = float32(squares) if finite else float32(np.nan)


def stats(x, residual=None, alpha=1.0):
    memory = Memory(residual, alpha)
    check_input(x, memory)
    out = torch.empty(3)
    _stats(*_tile.source(x), x.numel(), *_tile.factors(memory), out.numpy())
    return out
