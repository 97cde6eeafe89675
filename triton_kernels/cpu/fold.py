"""Numba kernels of the mergeable one-bit payloads; contracts in ops/fold.py."""

from __future__ import annotations

import numpy as np
import torch
from numba import float32, uint32, uintp

from ..layout import draws_of
from . import _philox, _tile
from ._arrays import floats, signed64, unsigned32
from ._bits import sign_mask, spread_mask
from ._jit import jit
from ._philox import key_of
from ._tile import TILE, copy, load

_EVERY_DRAW = 0, 65536


def bit_merge(left, right, below, key, merged):
    words = left.numel() // 4
    _merge(left.data_ptr(), right.data_ptr(), merged.data_ptr(), words, below, *_philox.words_of(key))


def one_hot_signs(x, rank, size, key, memory, bits):
    _signs(x, memory, bits, draws_of(rank, size), key)


def sign_bits(x, memory, bits):
    _signs(x, memory, bits, _EVERY_DRAW, None)


def signs_expand(bits, numel, eta, memory, result):
    signs_expand_each(bits, torch.tensor([eta], dtype=torch.float32), [numel], memory, result)


def signs_expand_each(bits, etas, sizes, memory, result):
    lengths = torch.tensor(sizes, dtype=torch.int64)
    places = lengths.data_ptr(), etas.data_ptr(), len(sizes)
    _expand(bits.data_ptr(), *places, result.numel(), result.data_ptr(), *_tile.factors(memory)[:2])


def _signs(x, memory, bits, draws, key):
    x = x.contiguous()
    r, updated = _tile.factors(memory)[:2]
    words = _philox.words_of(key)
    _encode(*_tile.source(x), x.numel(), r, updated, bits.data_ptr(), *draws, key is not None, *words)


@jit()
def _encode(
    x, kind, numel, r_at, updated_at, bits, low, high, has_key, seed, tensor, first, step, rank, stream
):  # fmt: skip
    """Bits of ``(p >= 0) & (low <= h < high)``, without the second term for no key."""
    r, updated = floats(r_at, numel), floats(updated_at, numel)
    words = unsigned32(bits, (numel + 31) // 32)
    lowest, end = float32(low), float32(high)
    key = key_of(seed, tensor, first, step, rank, stream)
    p = np.empty(TILE, np.float32)
    random = np.empty(TILE // 2, np.uint32)
    draw = random.view(np.uint16)
    for start in range(0, numel, TILE):
        count = min(TILE, numel - start)
        load(x, kind, start, count, p)
        if r_at:
            _add_and_keep(p, r, updated, start, count, r_at != updated_at)
        if has_key:
            _philox.fill(random, (count + 7) // 8, start // 8, key)
            for i in range(uintp(count)):
                h = float32(draw[i])
                p[i] = p[i] if lowest <= h and h < end else float32(-1)
        padded = (count + 31) // 32
        for i in range(count, 32 * padded):
            p[i] = float32(-1)
        for w in range(padded):
            words[start // 32 + w] = sign_mask(p, 32 * w)


@jit()
def _add_and_keep(p, r, updated, start, count, apart):
    """Two loops, since one over two arrays that may be the same memory would not vectorise."""
    start = uintp(start)
    if apart:
        for i in range(uintp(count)):
            p[i] = p[i] + r[start + i]
            updated[start + i] = p[i]
    else:
        for i in range(uintp(count)):
            p[i] = p[i] + updated[start + i]
            updated[start + i] = p[i]


@jit()
def _merge(left_at, right_at, merged_at, size, below, seed, tensor, first, step, rank, stream):
    left, right, merged = unsigned32(left_at, size), unsigned32(right_at, size), unsigned32(merged_at, size)
    key = key_of(seed, tensor, first, step, rank, stream)
    limit = float32(below) - float32(1)
    margin = np.empty(TILE, np.float32)
    random = np.empty(TILE // 2, np.uint32)
    draw = random.view(np.uint16)
    for start in range(0, size, TILE // 32):
        count = min(TILE // 32, size - start)
        _philox.fill(random, 4 * count, 4 * start, key)
        for i in range(uintp(32 * count)):
            margin[i] = limit - float32(draw[i])  # >= 0 where h < below, exact
        for w in range(count):
            a, b = left[start + w], right[start + w]
            merged[start + w] = uint32(b ^ ((a ^ b) & sign_mask(margin, 32 * w)))


@jit()
def _expand(bits, sizes_at, etas_at, parts, numel, result_at, r_at, updated_at):
    words, result = unsigned32(bits, (numel + 31) // 32), floats(result_at, numel)
    sizes, etas = signed64(sizes_at, parts), floats(etas_at, parts)
    r, updated = floats(r_at, numel), floats(updated_at, numel)
    edge = np.empty(32, np.float32)
    start = 0
    for part in range(parts):
        end = start + sizes[part]
        while start < end:
            stop = min(end, start - start % TILE + TILE)
            _spread(words, etas[part], start, stop, result, edge)
            if r_at != updated_at:
                copy(r, updated, start, stop - start)
            if r_at:
                for i in range(uintp(start), uintp(stop)):
                    updated[i] = updated[i] - result[i]
            start = stop


@jit()
def _spread(words, eta, start, stop, result, edge):
    """Elements ``start`` to ``stop``, the words that begin or end outside of them by way of ``edge``."""
    for w in range(start // 32, (stop + 31) // 32):
        if start <= 32 * w and 32 * w + 32 <= stop:
            spread_mask(words[w], eta, -eta, result, 32 * w)
        else:
            spread_mask(words[w], eta, -eta, edge, 0)
            for i in range(max(start, 32 * w), min(stop, 32 * w + 32)):
                result[i] = edge[i - 32 * w]
