"""Chunk-wise arg-max on the CPU: groups of whole chunks that stay in the second-level cache, read once from memory."""

from __future__ import annotations

import numpy as np
import torch

from . import _tile
from ._arrays import floats, signed32
from ._jit import jit
from ._tile import copy, memory_of

GROUP = 8192  # elements; x, r and p of a group take 96 KiB
MAGNITUDE = np.int32(0x7FFFFFFF)  # fp32 without its sign: as integers, magnitudes keep their order, NaN and Inf last
INFINITE = np.int32(0x7F800000)


def chunk_select(x, chunk, memory, indices, values):
    x = x.to(torch.float32).contiguous()
    arguments = x.data_ptr(), x.numel(), chunk, *_tile.factors(memory)
    _chunks(*arguments, indices.data_ptr(), values.data_ptr(), values.numel(), False)


def chunk_gather(x, indices, chunk, memory, values):
    x, indices = x.to(torch.float32).contiguous(), indices.contiguous()
    arguments = x.data_ptr(), x.numel(), chunk, *_tile.factors(memory)
    _chunks(*arguments, indices.data_ptr(), values.data_ptr(), values.numel(), True)


# LLVM vectorises the loops below as long as every value in them stays 32 bits wide; NumPy's promotion rules would widen
# the integers, hence the np.int32 around each of them and plain comparisons for max and min.


@jit()
def _largest(bits):
    """Largest magnitude, as an integer."""
    top = np.int32(0)
    for i in range(bits.size):
        magnitude = np.int32(bits[i] & MAGNITUDE)
        top = magnitude if magnitude > top else top
    return top


@jit()
def _first(bits, top):
    """Lowest index of the magnitude ``top``; a minimum over all elements is faster than a search that stops."""
    first = np.int32(bits.size)
    for i in range(bits.size):
        index = np.int32(i) if np.int32(bits[i] & MAGNITUDE) == top else np.int32(bits.size)
        first = index if index < first else first
    return first


@jit()
def _remember(x, old, new, decay, apart):
    """Two loops, since one over arrays that may be the same memory would not vectorise."""
    if apart:
        for i in range(x.size):
            new[i] = decay * old[i] + x[i]
    else:
        for i in range(x.size):
            new[i] = decay * new[i] + x[i]


@jit()
def _chunks(
    x_at, numel, chunk, r_at, updated_at, alpha64, decay64, sent64, indices_at, values_at, chunks, given
):  # fmt: skip
    x, indices, values = floats(x_at, numel), signed32(indices_at, chunks), floats(values_at, chunks)
    memory, new, alpha, decay, sent = memory_of(numel, r_at, updated_at, alpha64, decay64, sent64)
    remembers, apart = r_at != 0, r_at != updated_at
    group = max(1, GROUP // chunk)
    buffer = np.empty(min(group * chunk, numel) if remembers else 0, np.float32)
    for first in range(0, chunks, group):
        last = min(first + group, chunks)
        base = first * chunk
        g = x[base : min(last * chunk, numel)]
        p = g
        old, r = memory[base : base + g.size], new[base : base + g.size]
        if remembers:
            p = buffer[: g.size]
            for i in range(g.size):
                p[i] = g[i] + alpha * old[i]
        bits = p.view(np.int32)
        finite = True
        for c in range(first, last):
            start = c * chunk - base
            stop = min(start + chunk, g.size)
            top = _largest(bits[start:stop])
            if top >= INFINITE:
                finite = False
                values[c] = np.nan
                if not given:
                    indices[c] = 0
                continue
            if not given:
                indices[c] = _first(bits[start:stop], top)
            inside = 0 <= indices[c] < stop - start
            values[c] = p[start + indices[c]] if inside else np.float32(0)
        if not remembers:
            continue
        if finite:
            _remember(g, old, r, decay, apart)
        for c in range(first, last):
            start = c * chunk - base
            stop = min(start + chunk, g.size)
            if np.isnan(values[c]):
                if apart:
                    copy(old, r, start, stop - start)
                continue
            if not finite:
                _remember(g[start:stop], old[start:stop], r[start:stop], decay, apart)
            if 0 <= indices[c] < stop - start:
                r[start + indices[c]] -= sent * values[c]
