"""Numba kernels of the sign codec; contracts in ops/sign.py."""

from __future__ import annotations

import numpy as np
from numba import float32, int32, uintp

from ..layout import SCALE_MAX
from . import _philox, _tile
from ._arrays import floats, unsigned32
from ._bits import sign_mask, spread_mask
from ._jit import jit
from ._philox import key_of
from ._tile import (
    TILE,
    add,
    as_it_is,
    compensate,
    copy,
    divide,
    finite_bits,
    load,
    max_magnitude_bits,
    memory_of,
    remember,
    store,
    sum_abs,
    sum_squares,
)

_SCALE_MAX = np.float64(SCALE_MAX)
_HALF_RANGE = np.float32(2.0**-31)  # makes a signed 32-bit integer a number in [-1, 1]


@jit()
def _pack(p, count, words, first):
    """Bits ``p >= 0`` of ``count`` elements into ``words[first:]``; changes p beyond ``count``, up to whole words."""
    padded = (count + 31) // 32
    for i in range(count, 32 * padded):
        p[i] = float32(-1)
    for w in range(padded):
        words[first + w] = sign_mask(p, 32 * w)


@jit()
def _pack_given(p, count, words, first, tail):
    """The same of an array that is not ours; ``tail``: 32 elements for the last word."""
    whole = count // 32
    for w in range(whole):
        words[first + w] = sign_mask(p, 32 * w)
    if count % 32:
        tail[: count % 32] = p[32 * whole : count]
        _pack(tail, count % 32, words, first + whole)


@jit()
def _expand(words, first, count, scale, q):
    """``q = +scale`` where the bit is 1, ``-scale`` where it is 0; writes up to the next multiple of 32 elements."""
    for w in range((count + 31) // 32):
        spread_mask(words[first + w], scale, -scale, q, 32 * w)


@jit()
def _mean(scales, words, ranks, blocks, start, block, count, p, q):
    """``p`` = average of the decoded payloads over the tile that starts at ``start``."""
    size = words.size // ranks
    _expand(words, blocks + start // 32, count, scales[start // block], p)
    for row in range(size, ranks * size, size):
        _expand(words, row + blocks + start // 32, count, scales[row + start // block], q)
        add(p, q, count)
    divide(p, count, ranks)


@jit()
def _views(payloads, ranks, numel, block):
    """Scales and code words of payloads that stand end to end: two arrays over all of their memory."""
    count = ranks * ((numel + block - 1) // block + (numel + 31) // 32)
    return floats(payloads, count), unsigned32(payloads, count)


@jit()
def _encode(
    x, kind, payloads, ranks, numel, block, r_at, updated_at, alpha64, decay64, sent64, out
):  # fmt: skip
    """Encodes x or, if ``ranks`` > 0, the average of that many payloads."""
    given, sent = _views(payloads, ranks, numel, block), _views(out, 1, numel, block)
    memory = memory_of(numel, r_at, updated_at, alpha64, decay64, sent64)
    _encode_blocks(x, kind, *given, ranks, numel, block, r_at != 0, r_at != updated_at, *memory, *sent)


@jit()
def _encode_blocks(
    x, kind, in_scales, in_words, ranks, numel, block, has_r, apart, r, updated, alpha, decay, sent, scales, words
):  # fmt: skip
    blocks = (numel + block - 1) // block
    tile = min(block, TILE)
    p, q = np.empty(tile, np.float32), np.empty(tile, np.float32)
    kept = p if alpha == decay else np.empty(tile, np.float32)
    given = as_it_is(x, kind, numel, ranks, has_r)

    def fetch(start, count):
        if ranks:
            _mean(in_scales, in_words, ranks, blocks, start, block, count, p, q)
        elif not given.size:
            load(x, kind, start, count, p)
        if has_r:
            compensate(p, kept, r, start, count, alpha, decay)

    for b in range(blocks):
        first = b * block
        last = min(first + block, numel)
        total = 0.0
        for start in range(first, last, tile):
            count = min(tile, last - start)
            fetch(start, count)
            total += sum_abs(given[start : start + count] if given.size else p, count)
        finite = np.isfinite(total)
        scale = float32(total / (last - first)) if finite else float32(np.nan)
        scales[b] = scale
        for start in range(first, last, tile):
            count = min(tile, last - start)
            if last - first > tile:  # else the tile is still there
                fetch(start, count)
            if has_r and finite:
                for i in range(count):
                    q[i] = scale if p[i] >= float32(0) else -scale
                remember(updated, kept, q, start, count, sent)
            elif apart:
                copy(r, updated, start, count)
            if given.size:
                _pack_given(given[start : start + count], count, words, blocks + start // 32, q)
            else:
                _pack(p, count, words, blocks + start // 32)


@jit()
def _decode(payload, numel, block, out, weight, accumulate):
    scales, words = _views(payload, 1, numel, block)
    result, factor = floats(out, numel), float32(weight)
    blocks = (numel + block - 1) // block
    tile = min(block, TILE)
    q = np.empty(tile, np.float32)
    for b in range(blocks):
        last = min((b + 1) * block, numel)
        for start in range(b * block, last, tile):
            count = min(tile, last - start)
            _expand(words, blocks + start // 32, count, scales[b], q)
            store(q, result, start, count, factor, accumulate)


@jit()
def _vote(payloads, ranks, numel, out):
    size = (numel + 31) // 32
    ballots, words = unsigned32(payloads, ranks * size), unsigned32(out, size)
    votes, q = np.empty(TILE, np.float32), np.empty(TILE, np.float32)
    for start in range(0, numel, TILE):
        count = min(TILE, numel - start)
        _expand(ballots, start // 32, count, float32(1), votes)
        for rank in range(1, ranks):
            _expand(ballots, rank * size + start // 32, count, float32(1), q)
            add(votes, q, count)
        _pack(votes, count, words, start // 32)


@jit()
def _draw(x, kind, numel, out, seed, tensor, origin, step, rank, stream):
    scales, words = floats(out, 1), unsigned32(out, 1 + (numel + 31) // 32)
    key = key_of(seed, tensor, origin, step, rank, stream)
    p = np.empty(TILE, np.float32)
    random = np.empty(TILE, np.uint32)
    draw = random.view(np.int32)
    largest, squares = int32(0), 0.0
    for start in range(0, numel, TILE):
        count = min(TILE, numel - start)
        load(x, kind, start, count, p)
        largest = max(largest, max_magnitude_bits(p, count))
        squares += sum_squares(p, count)
    scale = float32(min(np.sqrt(squares), _SCALE_MAX)) if finite_bits(largest) else float32(np.nan)
    scales[0] = scale
    for start in range(0, numel, TILE):
        count = min(TILE, numel - start)
        load(x, kind, start, count, p)
        _philox.fill(random, (count + 3) // 4, start // 4, key)
        for i in range(uintp(count)):
            p[i] = p[i] - float32(draw[i]) * _HALF_RANGE * scale  # the sign of a difference is exact
        _pack(p, count, words, 1 + start // 32)


def sign_encode(x, block, memory, out):
    x = x.contiguous()
    _encode(*_tile.source(x), 0, 0, x.numel(), block, *_tile.factors(memory), out.data_ptr())


def sign_decode(payload, numel, block, out, weight, accumulate):
    _decode(payload.data_ptr(), numel, block, out.data_ptr(), float(weight), accumulate)


def sign_reduce(payloads, numel, block, out):
    given = payloads.data_ptr(), len(payloads), numel, block
    _encode(*_tile.NO_SOURCE, *given, *_tile.NO_MEMORY, out.data_ptr())


def sign_vote(payloads, numel, out):
    _vote(payloads.data_ptr(), len(payloads), numel, out.data_ptr())


def sign_draw(x, key, out):
    x = x.contiguous()
    if x.numel():
        words = _philox.words_of(key._replace(offset=2 * key.offset))
        _draw(*_tile.source(x), x.numel(), out.data_ptr(), *words)
