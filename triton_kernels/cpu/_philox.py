"""Numba twin of `philox.philox4x32`, vectorised by LLVM across counters: the random numbers of one tile at a time."""

from __future__ import annotations

import numpy as np
from numba import njit, uint32, uint64

from ..philox import MULTIPLIER_0, MULTIPLIER_1, ROUNDS, WEYL_0, WEYL_1, Key
from ._jit import jit

_M0, _M1 = np.uint64(MULTIPLIER_0), np.uint64(MULTIPLIER_1)
_W0, _W1 = np.uint32(WEYL_0), np.uint32(WEYL_1)
_32 = np.uint64(32)


def words_of(key: Key | None) -> tuple:
    """The six key and counter words as uint32, zeros for no key."""
    return tuple(np.uint32(word) for word in (key.words() if key is not None else (0,) * 6))


@njit(inline="always")
def philox_round(c0, c1, c2, c3, k0, k1):
    p0 = uint64(c0) * _M0
    p1 = uint64(c2) * _M1
    return uint32(p1 >> _32) ^ c1 ^ k0, uint32(p1), uint32(p0 >> _32) ^ c3 ^ k1, uint32(p0)


@jit()
def fill(out, counters, first, words):
    """Philox outputs of ``counters`` consecutive counters from ``first`` into ``out``, uint32 [4 * counters].

    Seen as uint16 (little-endian), ``out`` is the sequence of 16-bit values ``h`` of consecutive elements.
    """
    seed, tensor, origin, step, rank, stream = words
    start = uint32(origin + first)
    for i in range(counters):
        c0, c1, c2, c3 = uint32(start + uint32(i)), step, rank, stream
        k0, k1 = seed, tensor
        for _ in range(ROUNDS):
            c0, c1, c2, c3 = philox_round(c0, c1, c2, c3, k0, k1)
            k0, k1 = uint32(k0 + _W0), uint32(k1 + _W1)
        out[4 * i] = c0
        out[4 * i + 1] = c1
        out[4 * i + 2] = c2
        out[4 * i + 3] = c3
