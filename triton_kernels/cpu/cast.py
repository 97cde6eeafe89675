"""Numba kernels of the float casts; contracts in reference/cast.py."""

from __future__ import annotations

import numpy as np
import torch
from numba import float32, int32, uintp

from .. import layout
from ..layout import FP8_MAX, Memory
from . import _tile
from ._floats import from_bf16, from_fp8, from_fp16, to_bf16, to_fp8, to_fp16
from ._jit import jit
from ._tile import (
    BF16,
    FP16,
    TILE,
    add,
    compensate,
    divide,
    finite_bits,
    float_of,
    load,
    max_magnitude_bits,
    remember,
    store,
)

_HALF = {"bf16": BF16, "fp16": FP16}
_MAX, _INFINITE = np.float32(FP8_MAX), np.float32(np.inf)
_NO_PAYLOADS = np.empty(0, np.float32), np.empty(0, np.uint8), 0
_NO_HALVES = np.empty(0, np.uint16), 0


@jit()
def _expand_half(codes, first, kind, count, q):
    if kind == BF16:
        from_bf16(codes, first, count, q)
    else:
        from_fp16(codes, first, count, q)


@jit()
def _remember_finite(r, kept, q, start, count, sent):
    """``r = kept - sent * q`` where q is finite."""
    start = uintp(start)
    for i in range(uintp(count)):
        updated = kept[i] - sent * q[i]
        r[start + i] = updated if abs(q[i]) < _INFINITE else r[start + i]


@jit()
def _encode_half(x32, x16, source, in_codes, ranks, numel, kind, r, has_r, alpha, decay, sent, codes):
    """Encodes x or, if ``ranks`` > 0, the average of that many payloads that stand end to end in ``in_codes``."""
    p, q = np.empty(TILE, np.float32), np.empty(TILE, np.float32)
    kept = p if alpha == decay else np.empty(TILE, np.float32)
    for start in range(0, numel, TILE):
        count = min(TILE, numel - start)
        if ranks:
            _expand_half(in_codes, start, kind, count, p)
            for rank in range(1, ranks):
                _expand_half(in_codes, rank * codes.size + start, kind, count, q)
                add(p, q, count)
            divide(p, count, ranks)
        else:
            load(x32, x16, source, start, count, p)
        if has_r:
            compensate(p, kept, r, start, count, alpha, decay)
        if kind == BF16:
            to_bf16(p, count, codes, start)
        else:
            to_fp16(p, count, codes, start, q)
        if has_r:
            _expand_half(codes, start, kind, count, q)
            _remember_finite(r, kept, q, start, count, sent)
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
def _encode_fp8(
    x32, x16, source, in_scales, in_codes, ranks, numel, block, r, has_r, alpha, decay, sent, scales, codes
):  # fmt: skip
    """Encodes x or, if ``ranks`` > 0, the average of that many payloads, given as two views of the same memory."""
    blocks = (numel + block - 1) // block
    tile = min(block, TILE)
    p, q = np.empty(tile, np.float32), np.empty(tile, np.float32)
    kept = np.empty(tile, np.float32)

    def fetch(start, count):
        if ranks:
            _mean_fp8(in_scales, in_codes, ranks, blocks, start, block, count, p, q)
        else:
            load(x32, x16, source, start, count, p)
        if has_r:
            for i in range(count):
                kept[i] = p[i]
            compensate(kept, kept, r, start, count, decay, decay)
            compensate(p, p, r, start, count, alpha, alpha)

    for b in range(blocks):
        first = b * block
        last = min(first + block, numel)
        largest = int32(0)
        for start in range(first, last, tile):
            count = min(tile, last - start)
            fetch(start, count)
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
            place = 4 * blocks + start
            if finite and not zero:
                to_fp8(p, count, codes, place, inverse, q)
            else:
                codes[place : place + count] = 0
            if has_r and finite:
                from_fp8(codes, place, count, q, scale)
                remember(r, kept, q, start, count, sent)
    codes[4 * blocks + numel :] = 0


@jit()
def _decode_half(codes, numel, kind, out, weight, accumulate):
    q = np.empty(TILE, np.float32)
    for start in range(0, numel, TILE):
        count = min(TILE, numel - start)
        _expand_half(codes, start, kind, count, q)
        store(q, out, start, count, weight, accumulate)


@jit()
def _decode_fp8(scales, codes, numel, block, out, weight, accumulate):
    blocks = (numel + block - 1) // block
    tile = min(block, TILE)
    q = np.empty(tile, np.float32)
    for b in range(blocks):
        last = min((b + 1) * block, numel)
        for start in range(b * block, last, tile):
            count = min(tile, last - start)
            from_fp8(codes, 4 * blocks + start, count, q, scales[b])
            store(q, out, start, count, weight, accumulate)


def _views(payload):
    """The memory of one or more fp8 payloads as ``(fp32, uint8)`` arrays."""
    payload = payload.view(-1)
    return payload.view(torch.float32).numpy(), payload.numpy()


def _halves(payload):
    """The memory of one or more 16-bit payloads as a uint16 array."""
    return payload.view(-1).view(torch.uint16).numpy()


def cast_encode(x, kind, block, residual=None, alpha=1.0, decay=1.0, sent=1.0, out=None):
    memory = Memory(residual, alpha, decay, sent)
    layout.check_kind(kind)
    layout.check_block(block)
    layout.check_input(x, memory)
    out = layout.payload_for(out, layout.cast_bytes(x.numel(), kind, block), x)
    _encode(_tile.source(x), None, x.numel(), kind, block, memory, out)
    return out


def _encode(source, payloads, numel, kind, block, memory, out):
    if kind == "fp8":
        given = _NO_PAYLOADS if payloads is None else (*_views(payloads), len(payloads))
        _encode_fp8(*source, *given, numel, block, *_tile.factors(memory), *_views(out))
    else:
        given = _NO_HALVES if payloads is None else (_halves(payloads), len(payloads))
        _encode_half(*source, *given, numel, _HALF[kind], *_tile.factors(memory), _halves(out))


def cast_decode(payload, numel, kind, block, out=None, weight=1.0, accumulate=False):
    layout.check_kind(kind)
    layout.check_block(block)
    layout.check_payload(payload, layout.cast_bytes(numel, kind, block))
    out = layout.result_for(out, numel, payload, accumulate)
    result = out.numpy(), np.float32(weight), accumulate
    if kind == "fp8":
        _decode_fp8(*_views(payload), numel, block, *result)
    else:
        _decode_half(_halves(payload), numel, _HALF[kind], *result)
    return out


def cast_reduce(payloads, numel, kind, block, out=None, *, residual=None, alpha=1.0, decay=1.0, sent=1.0):
    memory = Memory(residual, alpha, decay, sent)
    layout.check_kind(kind)
    layout.check_block(block)
    layout.check_payloads(payloads, layout.cast_bytes(numel, kind, block))
    layout.check_residual(memory, payloads, numel)
    out = layout.payload_for(out, layout.cast_bytes(numel, kind, block), payloads)
    _encode(_tile.NO_SOURCE, payloads, numel, kind, block, memory, out)
    return out
