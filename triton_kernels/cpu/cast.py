"""Numba kernels of the float casts; contracts in ops/cast.py."""

from __future__ import annotations

import numpy as np
from numba import float32, int32, uintp

from ..layout import FP8_MAX
from . import _tile
from ._arrays import floats, unsigned8, unsigned16
from ._floats import from_bf16, from_fp8, from_fp16, to_bf16, to_fp8, to_fp16
from ._jit import jit
from ._tile import (
    BF16,
    FP16,
    TILE,
    add,
    as_it_is,
    compensate,
    copy,
    divide,
    finite_bits,
    float_of,
    load,
    max_magnitude_bits,
    memory_of,
    remember,
    store,
)

_HALF = {"bf16": BF16, "fp16": FP16}
_MAX, _INFINITE = np.float32(FP8_MAX), np.float32(np.inf)


@jit()
def _expand_half(codes, first, kind, count, q):
    if kind == BF16:
        from_bf16(codes, first, count, q)
    else:
        from_fp16(codes, first, count, q)


@jit()
def _remember_finite(updated, kept, q, start, count, sent):
    """``updated = kept - sent * q`` where q is finite."""
    start = uintp(start)
    for i in range(uintp(count)):
        new = kept[i] - sent * q[i]
        updated[start + i] = new if abs(q[i]) < _INFINITE else updated[start + i]


@jit()
def _encode_half(
    x, source, payloads, ranks, numel, kind, r_at, updated_at, alpha64, decay64, sent64, out
):  # fmt: skip
    """Encodes x or, if ``ranks`` > 0, the average of that many payloads that stand end to end."""
    size = (numel + 1) // 2 * 2
    in_codes, codes = unsigned16(payloads, ranks * size), unsigned16(out, size)
    r, updated, alpha, decay, sent = memory_of(numel, r_at, updated_at, alpha64, decay64, sent64)
    buffer, q = np.empty(TILE, np.float32), np.empty(TILE, np.float32)
    kept = buffer if alpha == decay else np.empty(TILE, np.float32)
    given = as_it_is(x, source, numel, ranks, r_at != 0)
    for start in range(0, numel, TILE):
        count = min(TILE, numel - start)
        p = given[start : start + count] if given.size else buffer
        if ranks:
            _expand_half(in_codes, start, kind, count, p)
            for rank in range(1, ranks):
                _expand_half(in_codes, rank * size + start, kind, count, q)
                add(p, q, count)
            divide(p, count, ranks)
        elif not given.size:
            load(x, source, start, count, p)
        if r_at:
            compensate(p, kept, r, start, count, alpha, decay)
        if kind == BF16:
            to_bf16(p, count, codes, start)
        else:
            to_fp16(p, count, codes, start, q)
        if r_at:
            if r_at != updated_at:
                copy(r, updated, start, count)
            _expand_half(codes, start, kind, count, q)
            _remember_finite(updated, kept, q, start, count, sent)
    codes[numel:] = 0


@jit()
def _mean_fp8(scales, codes, ranks, blocks, start, block, count, p, q):
    """``p`` = average of the decoded payloads over the tile that starts at ``start``."""
    size, b, first = codes.size // ranks, start // block, 4 * blocks + start
    from_fp8(codes, first, count, p, scales[b])
    for rank in range(1, ranks):
        from_fp8(codes, rank * size + first, count, q, scales[rank * size // 4 + b])
        add(p, q, count)
    divide(p, count, ranks)


@jit()
def _views(payloads, ranks, numel, block):
    """Scales and code bytes of fp8 payloads that stand end to end: two arrays over all of their memory."""
    count = ranks * ((numel + block - 1) // block + (numel + 3) // 4)
    return floats(payloads, count), unsigned8(payloads, 4 * count)


@jit()
def _encode_fp8(
    x, source, payloads, ranks, numel, block, r_at, updated_at, alpha64, decay64, sent64, out
):  # fmt: skip
    """Encodes x or, if ``ranks`` > 0, the average of that many payloads."""
    given, sent = _views(payloads, ranks, numel, block), _views(out, 1, numel, block)
    memory = memory_of(numel, r_at, updated_at, alpha64, decay64, sent64)
    _encode_blocks(x, source, *given, ranks, numel, block, r_at != 0, r_at != updated_at, *memory, *sent)


@jit()
def _encode_blocks(
    x, source, in_scales, in_codes, ranks, numel, block, has_r, apart, r, updated, alpha, decay, sent, scales, codes
):  # fmt: skip
    blocks = (numel + block - 1) // block
    tile = min(block, TILE)
    buffer, q = np.empty(tile, np.float32), np.empty(tile, np.float32)
    kept = buffer if alpha == decay else np.empty(tile, np.float32)
    given = as_it_is(x, source, numel, ranks, has_r)

    def fetch(start, count):
        if ranks:
            _mean_fp8(in_scales, in_codes, ranks, blocks, start, block, count, buffer, q)
        elif not given.size:
            load(x, source, start, count, buffer)
        if has_r:
            compensate(buffer, kept, r, start, count, alpha, decay)

    for b in range(blocks):
        first = b * block
        last = min(first + block, numel)
        largest = int32(0)
        for start in range(first, last, tile):
            count = min(tile, last - start)
            fetch(start, count)
            p = given[start : start + count] if given.size else buffer
            largest = max(largest, max_magnitude_bits(p, count))
        finite = finite_bits(largest)
        inverse = _MAX / float_of(largest)
        zero = np.isinf(inverse)
        scale = float32(0) if zero else float_of(largest) / _MAX
        scales[b] = scale if finite else float32(np.nan)
        for start in range(first, last, tile):
            count = min(tile, last - start)
            if last - first > tile:  # else the tile is still there
                fetch(start, count)
            p = given[start : start + count] if given.size else buffer
            place = 4 * blocks + start
            if finite and not zero:
                to_fp8(p, count, codes, place, inverse)
            else:
                codes[place : place + count] = 0
            if has_r and finite:
                from_fp8(codes, place, count, q, scale)
                remember(updated, kept, q, start, count, sent)
            elif apart:
                copy(r, updated, start, count)
    codes[4 * blocks + numel :] = 0


@jit()
def _decode_half(payload, numel, kind, out, weight, accumulate):
    codes, result, factor = unsigned16(payload, numel), floats(out, numel), float32(weight)
    q = np.empty(TILE, np.float32)
    for start in range(0, numel, TILE):
        count = min(TILE, numel - start)
        if factor == 1 and not accumulate:
            _expand_half(codes, start, kind, count, result[start : start + count])
        else:
            _expand_half(codes, start, kind, count, q)
            store(q, result, start, count, factor, accumulate)


@jit()
def _decode_fp8(payload, numel, block, out, weight, accumulate):
    scales, codes = _views(payload, 1, numel, block)
    result, factor = floats(out, numel), float32(weight)
    blocks = (numel + block - 1) // block
    tile = min(block, TILE)
    q = np.empty(tile, np.float32)
    for b in range(blocks):
        last = min((b + 1) * block, numel)
        for start in range(b * block, last, tile):
            count = min(tile, last - start)
            if factor == 1 and not accumulate:
                from_fp8(codes, 4 * blocks + start, count, result[start : start + count], scales[b])
            else:
                from_fp8(codes, 4 * blocks + start, count, q, scales[b])
                store(q, result, start, count, factor, accumulate)


def cast_encode(x, kind, block, memory, out):
    x = x.contiguous()
    _encode(_tile.source(x), 0, 0, x.numel(), kind, block, _tile.factors(memory), out)


def cast_decode(payload, numel, kind, block, out, weight, accumulate):
    result = out.data_ptr(), float(weight), accumulate
    if kind == "fp8":
        _decode_fp8(payload.data_ptr(), numel, block, *result)
    else:
        _decode_half(payload.data_ptr(), numel, _HALF[kind], *result)


def cast_reduce(payloads, numel, kind, block, out):
    _encode(_tile.NO_SOURCE, payloads.data_ptr(), len(payloads), numel, kind, block, _tile.NO_MEMORY, out)


def _encode(source, payloads, ranks, numel, kind, block, memory, out):
    if kind == "fp8":
        _encode_fp8(*source, payloads, ranks, numel, block, *memory, out.data_ptr())
    else:
        _encode_half(*source, payloads, ranks, numel, _HALF[kind], *memory, out.data_ptr())
