"""Numba kernels of the sign codec; contracts in reference/sign.py."""

from __future__ import annotations

import numpy as np
from numba import float32, njit, uint8, uint32, uint64

from .. import layout
from ..layout import Memory
from . import _tile
from ._tile import TILE, add, average, compensate, descend, load, remember, store, sum_abs

# Byte i of a word of eight 0/1 bytes becomes bit i of the top byte of the product.
_GATHER_BITS, _TOP_BYTE = np.uint64(0x0102040810204080), np.uint64(56)
_SIGN_BIT = np.uint32(0x80000000)
_NO_SCALES, _NO_WORDS = np.empty((0, 0), np.float32), np.empty((0, 0), np.uint32)


@njit(nogil=True, cache=True)
def _pack(p, count, ones, ones64, out, first):
    """Bits ``p >= 0`` of ``count`` elements, padded with zeros to a multiple of 32, into bytes ``out[first:]``."""
    padded = (count + 31) // 32 * 32
    for i in range(count):
        ones[i] = p[i] >= float32(0)
    for i in range(count, padded):
        ones[i] = 0
    for j in range(padded // 8):
        out[first + j] = uint8((ones64[j] * _GATHER_BITS) >> _TOP_BYTE)


@njit(nogil=True, cache=True)
def _expand(words, first, count, scale, q):
    """``q = +scale`` where the bit is 1, ``-scale`` where it is 0; writes up to the next multiple of 32 elements."""
    bits = q.view(np.uint32)
    positive = float32(scale).view(np.uint32)
    for w in range((count + 31) // 32):
        inverted = ~words[first + w]
        for k in range(32):
            bits[32 * w + k] = positive ^ (uint32(inverted << uint32(31 - k)) & _SIGN_BIT)


@njit(nogil=True, cache=True)
def _mean(scales, words, b, start, count, p, q):
    """``p`` = average of the decoded payloads over one tile of block ``b``."""
    ranks = scales.shape[0]
    _expand(words[0], start // 32, count, scales[0, b], p)
    for rank in range(1, ranks):
        _expand(words[rank], start // 32, count, scales[rank, b], q)
        add(p, q, count)
    average(p, count, ranks)


@njit(nogil=True, cache=True)
def _encode(x32, x16, kind, in_scales, in_words, numel, block, r, has_r, alpha, decay, sent, scales, code):
    """Encodes x, or with ``in_scales`` (shape [ranks, blocks]) the average of the payloads given."""
    tile = min(block, TILE)
    p, q = np.empty(tile, np.float32), np.empty(tile, np.float32)
    kept = p if alpha == decay else np.empty(tile, np.float32)
    ones = np.empty(tile, np.uint8)
    ones64 = ones.view(np.uint64)
    averaging = in_scales.shape[0] > 0
    for b in range(scales.size):
        first = b * block
        last = min(first + block, numel)
        total = 0.0
        for sweep in range(2):  # 0 measures the block, 1 quantizes it
            for start in range(first, last, tile):
                count = min(tile, last - start)
                if sweep == 0 or last - first > tile:  # a block of one tile is still in p
                    if averaging:
                        _mean(in_scales, in_words, b, start, count, p, q)
                    else:
                        load(x32, x16, kind, start, count, p)
                    if has_r:
                        compensate(p, kept, r, start, count, alpha, decay)
                if sweep == 0:
                    total += sum_abs(p, count)
                    continue
                _pack(p, count, ones, ones64, code, start // 8)
                if has_r and np.isfinite(total):
                    for i in range(count):
                        q[i] = scales[b] if p[i] >= float32(0) else -scales[b]
                    remember(r, kept, q, start, count, sent)
            if sweep == 0:
                scales[b] = float32(total / (last - first)) if np.isfinite(total) else float32(np.nan)


def sign_encode(x, block, residual=None, alpha=1.0, decay=1.0, sent=1.0, out=None):
    memory = Memory(residual, alpha, decay, sent)
    layout.check_block(block)
    layout.check_input(x, memory)
    numel = x.numel()
    out = layout.payload_for(out, layout.sign_bytes(numel, block), x)
    scales, words = layout.split(out, layout.blocks(numel, block))
    target = scales.numpy(), words.view(torch.uint8).numpy()
    _encode(*_tile.source(x), _NO_SCALES, _NO_WORDS, numel, block, *_tile.factors(memory), *target)
    return out
