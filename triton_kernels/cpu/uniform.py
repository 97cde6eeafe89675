"""Numba kernels of the uniform codec; contracts in ops/uniform.py."""

from __future__ import annotations

import numpy as np
from numba import float32, int8, int32, uint8, uint16, uint32, uintp

from ..layout import SCALE_MAX, uniform_levels
from ..reference.uniform import grid
from . import _philox, _tile
from ._arrays import floats, unsigned8
from ._jit import jit
from ._philox import key_of
from ._tile import (
    TILE,
    as_it_is,
    compensate,
    copy,
    divide,
    finite_bits,
    float_of,
    load,
    max_magnitude_bits,
    memory_of,
    store,
    sum_squares,
)

_SCALE_MAX = np.float32(SCALE_MAX)
# u = h * U_STEP + U_BASE, exact: (h + 1/2) / 65536, or 1/2 for every h
_STOCHASTIC = np.float32(2.0**-16), np.float32(2.0**-17)
_NEAREST = np.float32(0.0), np.float32(0.5)


@jit()
def _quantize(p, halves, rounding, inverse, levels, count, target, first):
    """``target[first + i] = clip(floor(p * inverse + u), -levels, levels)``; target is int8 or int16."""
    u_step, u_base = rounding
    first = uintp(first)
    for i in range(uintp(count)):
        v = p[i] * inverse + (float32(int32(halves[i])) * u_step + u_base)
        target[first + i] = int32(min(max(np.floor(v), -levels), levels))


@jit()
def _remember(updated, kept, source, first, step, start, count, sent):
    """``updated = kept - sent * (code * step)``."""
    start, first = uintp(start), uintp(first)
    for i in range(uintp(count)):
        updated[start + i] = kept[i] - sent * (float32(int32(source[first + i])) * step)


@jit()
def _write(target, first, given, memory):
    """Codes of one tile to ``target[first:]``, zeros if it is not finite, and its memory."""
    p, halves, rounding, inverse, levels, count, finite = given
    has_r, apart, r, updated, kept, step, start, sent = memory
    if not finite:
        for i in range(count):
            target[first + i] = 0
        if apart:
            copy(r, updated, start, count)
        return
    _quantize(p, halves, rounding, inverse, levels, count, target, first)
    if has_r:
        _remember(updated, kept, target, first, step, start, count, sent)


@jit()
def _pack(narrow, count, bits, codes, first):
    """Codes of 2 or 4 bits, one a byte, into ``codes[first:]``; changes ``narrow`` beyond ``count``."""
    for i in range(count, (count + 3) // 4 * 4):
        narrow[i] = 0
    first = uintp(first)
    if bits == 4:
        pairs = narrow.view(np.uint16)
        for i in range(uintp((count + 1) // 2)):
            codes[first + i] = uint8((pairs[i] & uint16(0xF)) | ((pairs[i] >> uint16(4)) & uint16(0xF0)))
    else:
        quads = narrow.view(np.uint32)
        for i in range(uintp((count + 3) // 4)):
            v = quads[i] & uint32(0x03030303)
            codes[first + i] = uint8(v | (v >> uint32(6)) | (v >> uint32(12)) | (v >> uint32(18)))


@jit()
def _unpack(codes, first, count, bits, narrow):
    """Inverse of `_pack`, with the signs extended; writes up to the next multiple of four codes."""
    first = uintp(first)
    if bits == 4:
        pairs = narrow.view(np.uint16)
        for i in range(uintp((count + 1) // 2)):
            v = uint16(codes[first + i])
            pairs[i] = (v & uint16(0xF)) | ((v & uint16(0xF0)) << uint16(4))
    else:
        quads = narrow.view(np.uint32)
        for i in range(uintp((count + 3) // 4)):
            v = uint32(codes[first + i])
            v = v | (v << uint32(6)) | (v << uint32(12)) | (v << uint32(18))
            quads[i] = v & uint32(0x03030303)
    half = int8(1 << (bits - 1))
    for i in range(uintp(count)):
        narrow[i] = int8(int8(narrow[i] ^ half) - half)


@jit()
def _scale_codes(source, first, count, step, q):
    first = uintp(first)
    for i in range(uintp(count)):
        q[i] = float32(int32(source[first + i])) * step


@jit()
def _add_codes(source, first, count, step, q):
    first = uintp(first)
    for i in range(uintp(count)):
        q[i] = q[i] + float32(int32(source[first + i])) * step


@jit()
def _expand(codes, narrow, first, count, bits, step, q, more):
    """``q = code * step`` of the ``count`` codes in the bytes ``codes[first:]``, or ``q += code * step``."""
    if bits < 8:
        _unpack(codes, first, count, bits, narrow)
    if more:
        if bits == 16:
            _add_codes(codes.view(np.int16), first // 2, count, step, q)
        elif bits == 8:
            _add_codes(codes.view(np.int8), first, count, step, q)
        else:
            _add_codes(narrow, 0, count, step, q)
    elif bits == 16:
        _scale_codes(codes.view(np.int16), first // 2, count, step, q)
    elif bits == 8:
        _scale_codes(codes.view(np.int8), first, count, step, q)
    else:
        _scale_codes(narrow, 0, count, step, q)


@jit()
def _mean(scales, codes, ranks, narrow, blocks, start, block, count, bits, levels, p):
    """``p`` = average of the decoded payloads over the tile that starts at ``start``."""
    size, b, first = codes.size // ranks, start // block, 4 * blocks + start * bits // 8
    _expand(codes, narrow, first, count, bits, scales[b] / levels, p, False)
    for rank in range(1, ranks):
        step = scales[rank * size // 4 + b] / levels
        _expand(codes, narrow, rank * size + first, count, bits, step, p, True)
    divide(p, count, ranks)


@jit()
def _views(payloads, ranks, numel, block, bits):
    """Scales and code bytes of payloads that stand end to end: two arrays over all of their memory."""
    count = ranks * ((numel + block - 1) // block + (numel * bits + 31) // 32)
    return floats(payloads, count), unsigned8(payloads, 4 * count)


@jit()
def _encode(
    x, kind, payloads, ranks, numel, block, bits, l2, stochastic, seed, tensor, origin, draw, rank, stream,
    r_at, updated_at, alpha64, decay64, sent64, out,
):  # fmt: skip
    """Encodes x or, if ``ranks`` > 0, the average of that many payloads."""
    given, sent = _views(payloads, ranks, numel, block, bits), _views(out, 1, numel, block, bits)
    memory = memory_of(numel, r_at, updated_at, alpha64, decay64, sent64)
    words = key_of(seed, tensor, origin, draw, rank, stream)
    settings = ranks, numel, block, bits, l2, stochastic, words
    _encode_blocks(x, kind, *given, *settings, r_at != 0, r_at != updated_at, *memory, *sent)


@jit()
def _encode_blocks(
    x, kind, in_scales, in_codes, ranks, numel, block, bits, l2, stochastic, words,
    has_r, apart, r, updated, alpha, decay, sent, scales, codes,
):  # fmt: skip
    rounding = _STOCHASTIC if stochastic else _NEAREST
    blocks = (numel + block - 1) // block
    tile = min(block, TILE)
    buffer = np.empty(tile, np.float32)
    kept = buffer if alpha == decay else np.empty(tile, np.float32)
    given = as_it_is(x, kind, numel, ranks, has_r)
    narrow, small, wide = np.empty(tile, np.int8), codes.view(np.int8), codes.view(np.int16)
    random = np.zeros((tile + 63) // 64 * 32, np.uint32)
    halves = random.view(np.uint16)
    levels = float32((1 << (bits - 1)) - 1)
    codes[4 * blocks + numel * bits // 8 :] = 0  # the padding; a last code that shares its byte is written below

    def fetch(start, count):
        if ranks:
            _mean(in_scales, in_codes, ranks, narrow, blocks, start, block, count, bits, levels, buffer)
        elif not given.size:
            load(x, kind, start, count, buffer)
        if has_r:
            compensate(buffer, kept, r, start, count, alpha, decay)

    for b in range(blocks):
        first = b * block
        last = min(first + block, numel)
        largest, squares = int32(0), 0.0
        for start in range(first, last, tile):
            count = min(tile, last - start)
            fetch(start, count)
            p = given[start : start + count] if given.size else buffer
            largest = max(largest, max_magnitude_bits(p, count))
            if l2:
                squares += sum_squares(p, count)
        finite = finite_bits(largest)
        scale = float32(np.sqrt(squares)) if l2 else float_of(largest)
        scale = min(scale, _SCALE_MAX) if finite else float32(np.nan)
        inverse = levels / scale
        if np.isinf(inverse):
            scale = float32(0)
        if not finite or scale == 0:
            inverse = float32(0)
        scales[b] = scale
        step = scale / levels
        for start in range(first, last, tile):
            count = min(tile, last - start)
            if last - first > tile:  # else the tile is still there
                fetch(start, count)
            p = given[start : start + count] if given.size else buffer
            if stochastic and finite:
                _philox.fill(random, (count + 7) // 8, start // 8, words)
            place = 4 * blocks + start * bits // 8
            numbers = (p, halves, rounding, inverse, levels, count, finite)
            memory = (has_r, apart, r, updated, kept, step, start, sent)
            if bits == 16:
                _write(wide, place // 2, numbers, memory)
            elif bits == 8:
                _write(small, place, numbers, memory)
            else:
                _write(narrow, 0, numbers, memory)
                _pack(narrow, count, bits, codes, place)


@jit()
def _decode(payload, numel, block, bits, out, weight, accumulate):
    scales, codes = _views(payload, 1, numel, block, bits)
    result, factor = floats(out, numel), float32(weight)
    blocks = (numel + block - 1) // block
    tile = min(block, TILE)
    q, narrow = np.empty(tile, np.float32), np.empty(tile, np.int8)
    levels = float32((1 << (bits - 1)) - 1)
    for b in range(blocks):
        last = min((b + 1) * block, numel)
        for start in range(b * block, last, tile):
            count = min(tile, last - start)
            place, step = 4 * blocks + start * bits // 8, scales[b] / levels
            if factor == 1 and not accumulate:
                _expand(codes, narrow, place, count, bits, step, result[start : start + count], False)
            else:
                _expand(codes, narrow, place, count, bits, step, q, False)
                store(q, result, start, count, factor, accumulate)


@jit()
def _average(payloads, ranks, numel, block, bits, out):
    scales, codes = _views(payloads, ranks, numel, block, bits)
    result = floats(out, numel)
    blocks = (numel + block - 1) // block
    tile = min(block, TILE)
    narrow = np.empty(tile, np.int8)
    levels = float32((1 << (bits - 1)) - 1)
    for first in range(0, numel, block):
        last = min(first + block, numel)
        for start in range(first, last, tile):
            count = min(tile, last - start)
            mean = result[start : start + count]
            _mean(scales, codes, ranks, narrow, blocks, start, block, count, bits, levels, mean)


@jit()
def _round(x_at, numel, inverse64, step64, top, seed, tensor, origin, draw, rank, stream, out_at):
    x, out = floats(x_at, numel), floats(out_at, numel)
    inverse, step, levels = float32(inverse64), float32(step64), float32(top)
    words = key_of(seed, tensor, origin, draw, rank, stream)
    u_step, u_base = _STOCHASTIC
    random = np.zeros(TILE // 2, np.uint32)
    halves = random.view(np.uint16)
    for start in range(0, numel, TILE):
        count = min(TILE, numel - start)
        _philox.fill(random, (count + 7) // 8, start // 8, words)
        first = uintp(start)
        for i in range(uintp(count)):
            v = x[first + i] * inverse + (float32(int32(halves[i])) * u_step + u_base)
            out[first + i] = min(max(np.floor(v), -levels), levels) * step


def uniform_encode(x, bits, block, key, l2, memory, out):
    x = x.contiguous()
    settings = x.numel(), block, bits, l2, key is not None, *_philox.words_of(key)
    _encode(*_tile.source(x), 0, 0, *settings, *_tile.factors(memory), out.data_ptr())


def uniform_decode(payload, numel, bits, block, out, weight, accumulate):
    _decode(payload.data_ptr(), numel, block, bits, out.data_ptr(), float(weight), accumulate)


def uniform_reduce(payloads, numel, bits, block, key, l2, out):
    given = payloads.data_ptr(), len(payloads), numel, block, bits, l2, key is not None, *_philox.words_of(key)
    _encode(*_tile.NO_SOURCE, *given, *_tile.NO_MEMORY, out.data_ptr())


def uniform_average(payloads, numel, bits, block, out):
    _average(payloads.data_ptr(), len(payloads), numel, block, bits, out.data_ptr())


def uniform_round(x, bits, scale, key, out):
    numbers = *grid(bits, scale), uniform_levels(bits)
    _round(x.data_ptr(), x.numel(), *numbers, *_philox.words_of(key), out.data_ptr())
