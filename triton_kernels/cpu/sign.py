"""Numba kernels of the sign codec; contracts in reference/sign.py."""

from __future__ import annotations

import numpy as np
import torch
from numba import float32, int32, uintp

from .. import layout
from ..layout import SCALE_MAX, Memory
from . import _philox, _tile
from ._bits import sign_mask, spread_mask
from ._jit import jit
from ._tile import (
    TILE,
    add,
    compensate,
    descend,
    divide,
    finite_bits,
    load,
    max_magnitude_bits,
    remember,
    store,
    sum_abs,
    sum_squares,
)

_SCALE_MAX = np.float64(SCALE_MAX)
_HALF_RANGE = np.float32(2.0**-31)  # makes a signed 32-bit integer a number in [-1, 1]
_NO_PAYLOADS = np.empty(0, np.float32), np.empty(0, np.uint32), 0


@jit()
def _pack(p, count, words, first):
    """Bits ``p >= 0`` of ``count`` elements into ``words[first:]``; changes p beyond ``count``, up to whole words."""
    padded = (count + 31) // 32
    for i in range(count, 32 * padded):
        p[i] = float32(-1)
    for w in range(padded):
        words[first + w] = sign_mask(p, 32 * w)


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
def _encode(x32, x16, kind, in_scales, in_words, ranks, numel, block, r, has_r, alpha, decay, sent, scales, words):
    """Encodes x or, if ``ranks`` > 0, the average of that many payloads.

    A payload, or several end to end, comes as two views of the same memory, fp32 (``scales``) and uint32 (``words``).
    """
    blocks = (numel + block - 1) // block
    tile = min(block, TILE)
    p, q = np.empty(tile, np.float32), np.empty(tile, np.float32)
    kept = p if alpha == decay else np.empty(tile, np.float32)

    def fetch(start, count):
        if ranks:
            _mean(in_scales, in_words, ranks, blocks, start, block, count, p, q)
        else:
            load(x32, x16, kind, start, count, p)
        if has_r:
            compensate(p, kept, r, start, count, alpha, decay)

    for b in range(blocks):
        first = b * block
        last = min(first + block, numel)
        total = 0.0
        for start in range(first, last, tile):
            count = min(tile, last - start)
            fetch(start, count)
            total += sum_abs(p, count)
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
                remember(r, kept, q, start, count, sent)
            _pack(p, count, words, blocks + start // 32)


@jit()
def _decode(scales, words, numel, block, out, weight, accumulate):
    blocks = (numel + block - 1) // block
    tile = min(block, TILE)
    q = np.empty(tile, np.float32)
    for b in range(blocks):
        last = min((b + 1) * block, numel)
        for start in range(b * block, last, tile):
            count = min(tile, last - start)
            _expand(words, blocks + start // 32, count, scales[b], q)
            store(q, out, start, count, weight, accumulate)


@jit()
def _apply(scales, words, numel, block, param, m, has_m, lr, momentum):
    blocks = (numel + block - 1) // block
    tile = min(block, TILE)
    q = np.empty(tile, np.float32)
    for b in range(blocks):
        last = min((b + 1) * block, numel)
        for start in range(b * block, last, tile):
            count = min(tile, last - start)
            _expand(words, blocks + start // 32, count, scales[b], q)
            descend(q, param, m, has_m, start, count, lr, momentum)


@jit()
def _vote(ballots, ranks, numel, out):
    votes, q = np.empty(TILE, np.float32), np.empty(TILE, np.float32)
    for start in range(0, numel, TILE):
        count = min(TILE, numel - start)
        _expand(ballots, start // 32, count, float32(1), votes)
        for rank in range(1, ranks):
            _expand(ballots, rank * out.size + start // 32, count, float32(1), q)
            add(votes, q, count)
        _pack(votes, count, out, start // 32)


@jit()
def _draw(x32, x16, kind, numel, scales, words, key):
    p = np.empty(TILE, np.float32)
    random = np.empty(TILE, np.uint32)
    draw = random.view(np.int32)
    largest, squares = int32(0), 0.0
    for start in range(0, numel, TILE):
        count = min(TILE, numel - start)
        load(x32, x16, kind, start, count, p)
        largest = max(largest, max_magnitude_bits(p, count))
        squares += sum_squares(p, count)
    scale = float32(min(np.sqrt(squares), _SCALE_MAX)) if finite_bits(largest) else float32(np.nan)
    scales[0] = scale
    for start in range(0, numel, TILE):
        count = min(TILE, numel - start)
        load(x32, x16, kind, start, count, p)
        _philox.fill(random, (count + 3) // 4, start // 4, key)
        for i in range(uintp(count)):
            p[i] = p[i] - float32(draw[i]) * _HALF_RANGE * scale  # the sign of a difference is exact
        _pack(p, count, words, 1 + start // 32)


def _views(payload):
    """The memory of one or more payloads as ``(fp32, uint32)`` arrays."""
    payload = payload.view(-1)
    return payload.view(torch.float32).numpy(), payload.view(torch.uint32).numpy()


def sign_encode(x, block, residual=None, alpha=1.0, decay=1.0, sent=1.0, out=None):
    memory = Memory(residual, alpha, decay, sent)
    layout.check_block(block)
    layout.check_input(x, memory)
    numel = x.numel()
    out = layout.payload_for(out, layout.sign_bytes(numel, block), x)
    _encode(*_tile.source(x), *_NO_PAYLOADS, numel, block, *_tile.factors(memory), *_views(out))
    return out


def sign_decode(payload, numel, block, out=None, weight=1.0, accumulate=False):
    layout.check_block(block)
    layout.check_payload(payload, layout.sign_bytes(numel, block))
    out = layout.result_for(out, numel, payload, accumulate)
    _decode(*_views(payload), numel, block, out.numpy(), np.float32(weight), accumulate)
    return out


def sign_reduce(payloads, numel, block, out=None, *, residual=None, alpha=1.0, decay=1.0, sent=1.0):
    memory = Memory(residual, alpha, decay, sent)
    layout.check_block(block)
    layout.check_payloads(payloads, layout.sign_bytes(numel, block))
    layout.check_residual(memory, payloads, numel)
    out = layout.payload_for(out, layout.sign_bytes(numel, block), payloads)
    given = *_views(payloads), len(payloads)
    _encode(*_tile.NO_SOURCE, *given, numel, block, *_tile.factors(memory), *_views(out))
    return out


def sign_vote(payloads, numel):
    layout.check_payloads(payloads, 4 * layout.words(numel, 1))
    out = torch.empty(payloads.shape[1], dtype=torch.uint8)
    _vote(_views(payloads)[1], len(payloads), numel, _views(out)[1])
    return out


def sign_apply(payload, param, block, lr, momentum_buffer=None, momentum=0.0):
    numel = param.numel()
    layout.check_block(block)
    layout.check_payload(payload, layout.sign_bytes(numel, block))
    layout.check_apply(payload, param, momentum_buffer)
    _apply(*_views(payload), numel, block, *_tile.descent(param, momentum_buffer, lr, momentum))


def sign_draw(x, key, out=None):
    layout.check_input(x, Memory())
    numel = x.numel()
    out = layout.payload_for(out, layout.sign_bytes(numel, layout.single_block(numel)), x)
    if numel:
        words = _philox.words_of(key._replace(offset=2 * key.offset))
        _draw(*_tile.source(x), numel, *_views(out), words)
    return out
