"""Triton kernels of the float casts; contracts in ops/cast.py.

bf16 and e4m3 are converted by integer arithmetic, which gives the same bits on every GPU, fp8 unit or not.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

from .. import layout
from ._tile import (
    Geometry,
    compensate,
    factors,
    magnitude_bits,
    mean_of,
    mode_of,
    moments,
    only,
    over,
    place,
    present,
    put,
    read,
    read_x,
    remember,
    row_max,
    write,
)

_INF, _INF_BITS = tl.constexpr(float("inf")), tl.constexpr(0x7F800000)
_FP8_NORMAL = tl.constexpr((127 - 6) << 23)
_2_14_BITS = tl.constexpr((127 + 14) << 23)
_CHUNK = 1024  # elements of a program for the 16-bit kinds, which have no blocks


@triton.jit
def _to_half(p, BF16: tl.constexpr):
    """fp32 -> int16 bits, to nearest even, NaN canonical."""
    bits = p.to(tl.int32, bitcast=True)
    if BF16:
        unsigned = bits.to(tl.uint32, bitcast=True)
        code = ((unsigned + 0x7FFF + ((unsigned >> 16) & 1)) >> 16).to(tl.int16)
        nan = 0x7FC0
    else:
        code = p.to(tl.float16).to(tl.int16, bitcast=True)
        nan = 0x7E00
    return tl.where(magnitude_bits(p) > _INF_BITS, nan, code).to(tl.int16)


@triton.jit
def _from_half(code, BF16: tl.constexpr):
    if BF16:
        return (code.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    return code.to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def _to_fp8(y):
    """fp32 of at most 448 * (1 + 2**-22) -> e4m3 bits as int32, to nearest even."""
    bits = magnitude_bits(y)
    normal = (bits + 0x7FFFF + ((bits >> 20) & 1) - (120 << 23)) >> 20
    # Adding 2**14 rounds to a multiple of 2**-9, the e4m3 subnormals.
    small = (tl.abs(y) + 16384.0).to(tl.int32, bitcast=True) - _2_14_BITS
    return tl.where(bits >= _FP8_NORMAL, normal, small) | ((y.to(tl.int32, bitcast=True) >> 24) & 0x80)


@triton.jit
def _from_fp8(code):
    """e4m3 bits as int32 -> fp32."""
    magnitude = code & 0x7F
    number = tl.where(magnitude == 0x7F, 0x7FC00000, (magnitude << 20) + (120 << 23))
    normal = number.to(tl.float32, bitcast=True)
    value = tl.where(magnitude >= 8, normal, magnitude.to(tl.float32) * 0.001953125)
    return (value.to(tl.int32, bitcast=True) | ((code & 0x80) << 24)).to(tl.float32, bitcast=True)


@triton.jit
def _finish_half(
    codes, origin, octet, inside, left, value, old, p, updated, decay, sent,
    BF16: tl.constexpr, MEMORY: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    code = _to_half(p, BF16)
    write(codes + 8 * origin, octet, inside, left, code, WHOLE, PADDING=2)  # of a masked element, which is zero
    if MEMORY:
        q = _from_half(code, BF16)
        remember(updated, origin, octet, inside, left, tl.abs(q) < _INF, value, old, q, decay, sent, WHOLE)


@triton.jit
def _encode_half(
    x, stride, r, updated, alpha, decay, sent, numel, block, codes, tiles,
    BF16: tl.constexpr, MEMORY: tl.constexpr, WHOLE: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    head, origin, left, octet, within = place(tiles, block, numel, ROWS, LANES)
    inside = within & (8 * octet < left)
    value = read_x(x, stride, origin, octet, inside, left, WHOLE)
    old, p = compensate(value, r, alpha, origin, octet, inside, left, MEMORY, WHOLE)
    _finish_half(codes, origin, octet, inside, left, value, old, p, updated, decay, sent, BF16, MEMORY, WHOLE)


@triton.jit
def _reduce_half(
    in_codes, size, numel, block, codes, tiles,
    RANKS: tl.constexpr, BF16: tl.constexpr, WHOLE: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """``size``: codes between two ranks' payloads."""
    head, origin, left, octet, within = place(tiles, block, numel, ROWS, LANES)
    inside = within & (8 * octet < left)
    in_codes += 8 * origin
    value = _from_half(read(in_codes, octet, inside, left, WHOLE), BF16)
    for _ in range(1, RANKS):
        in_codes += size
        value += _from_half(read(in_codes, octet, inside, left, WHOLE), BF16)
    value = over(value, RANKS)
    _finish_half(codes, origin, octet, inside, left, value, value, value, codes, 1.0, 1.0, BF16, 0, WHOLE)


@triton.jit
def _decode_half(
    codes, out, weight, numel, block, tiles,
    BF16: tl.constexpr, ACCUMULATE: tl.constexpr, WHOLE: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    head, origin, left, octet, within = place(tiles, block, numel, ROWS, LANES)
    inside = within & (8 * octet < left)
    value = _from_half(read(codes + 8 * origin, octet, inside, left, WHOLE), BF16)
    put(out, origin, octet, inside, left, value, weight, ACCUMULATE, WHOLE)


@triton.jit
def _finish_fp8(
    scales, codes, head, origin, octet, inside, left, value, old, p, updated, decay, sent, block, absmax,
    MEMORY: tl.constexpr, GIVEN: tl.constexpr, WHOLE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """``GIVEN``: the bits of max |p| of every block stand in ``absmax``, because no tile holds a whole block."""
    row, exists = head + tl.arange(0, ROWS), present(block, left, ROWS)
    largest = tl.load(absmax + row, mask=exists, other=0) if GIVEN else row_max(magnitude_bits(p))
    finite = largest < _INF_BITS
    norm = tl.where(finite, largest, 0).to(tl.float32, bitcast=True)
    top = tl.zeros([ROWS], tl.float32) + 448.0
    inverse = tl.div_rn(top, norm)
    live = inverse < _INF
    scale = tl.where(finite, tl.where(live, tl.div_rn(norm, top), 0.0), float("nan"))
    tl.store(scales + row, scale, mask=exists)  # tiles of one block all write the same value
    live = (live & finite)[:, None, None]
    code = _to_fp8(tl.where(live, p, 0.0) * tl.where(live, inverse[:, None, None], 0.0))
    write(codes + 8 * origin, octet, inside, left, code.to(tl.uint8), WHOLE, PADDING=4)
    if MEMORY:
        q = _from_fp8(code) * scale[:, None, None]
        remember(updated, origin, octet, inside, left, finite[:, None, None], value, old, q, decay, sent, WHOLE)


@triton.jit
def _encode_fp8(
    x, stride, r, updated, alpha, decay, sent, numel, block, scales, codes, absmax, tiles,
    MEMORY: tl.constexpr, GIVEN: tl.constexpr, WHOLE: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    head, origin, left, octet, within = place(tiles, block, numel, ROWS, LANES)
    inside = within & (8 * octet < left)
    value = read_x(x, stride, origin, octet, inside, left, WHOLE)
    old, p = compensate(value, r, alpha, origin, octet, inside, left, MEMORY, WHOLE)
    _finish_fp8(
        scales, codes, head, origin, octet, inside, left, value, old, p, updated, decay, sent, block, absmax,
        MEMORY, GIVEN, WHOLE, ROWS,
    )  # fmt: skip


@triton.jit
def _decode_tile(scales, codes, head, origin, octet, inside, left, block, WHOLE: tl.constexpr, ROWS: tl.constexpr):
    scale = tl.load(scales + head + tl.arange(0, ROWS), mask=present(block, left, ROWS), other=0.0)
    code = read(codes + 8 * origin, octet, inside, left, WHOLE)
    return _from_fp8(code.to(tl.int32)) * scale[:, None, None]


@triton.jit
def _reduce_fp8(
    in_scales, in_codes, size, numel, block, scales, codes, tiles,
    RANKS: tl.constexpr, WHOLE: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """``size``: bytes between two ranks' payloads."""
    head, origin, left, octet, within = place(tiles, block, numel, ROWS, LANES)
    inside = within & (8 * octet < left)
    value = _decode_tile(in_scales, in_codes, head, origin, octet, inside, left, block, WHOLE, ROWS)
    for _ in range(1, RANKS):
        in_scales += size // 4
        in_codes += size
        value += _decode_tile(in_scales, in_codes, head, origin, octet, inside, left, block, WHOLE, ROWS)
    value = only(over(value, RANKS), octet, inside, left, WHOLE)
    _finish_fp8(
        scales, codes, head, origin, octet, inside, left, value, value, value, scales, 1.0, 1.0, block, scales,
        0, False, WHOLE, ROWS,
    )  # fmt: skip


@triton.jit
def _decode_fp8(
    scales, codes, out, weight, numel, block, tiles,
    ACCUMULATE: tl.constexpr, WHOLE: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    head, origin, left, octet, within = place(tiles, block, numel, ROWS, LANES)
    inside = within & (8 * octet < left)
    value = _decode_tile(scales, codes, head, origin, octet, inside, left, block, WHOLE, ROWS)
    put(out, origin, octet, inside, left, value, weight, ACCUMULATE, WHOLE)


def _parts(payload, numel, block):
    """``(scales fp32, code bytes)`` of fp8 payloads."""
    scales, words = layout.split(payload, layout.blocks(numel, block))
    return scales, words.view(torch.uint8)


def cast_encode(x, kind, block, memory, out):
    numel, mode = x.numel(), mode_of(memory)
    source = x, x.stride(0), *factors(x, memory), numel
    if kind == "fp8":
        cut = Geometry(numel, block)
        scales, codes = _parts(out, numel, block)
        absmax = moments(x, memory, block)[0] if cut.long else scales
        cut.launch(_encode_fp8, x, *source, block, scales, codes, absmax, MEMORY=mode, GIVEN=cut.long)
    else:
        codes = out.view(torch.int16)
        Geometry(numel, _CHUNK).launch(_encode_half, x, *source, _CHUNK, codes, BF16=kind == "bf16", MEMORY=mode)


def cast_decode(payload, numel, kind, block, out, weight, accumulate):
    if kind == "fp8":
        arguments = *_parts(payload, numel, block), out, float(weight), numel, block
        Geometry(numel, block).launch(_decode_fp8, payload, *arguments, ACCUMULATE=accumulate)
    elif numel:
        arguments = payload.view(torch.int16), out, float(weight), numel, _CHUNK
        constants = {"BF16": kind == "bf16", "ACCUMULATE": accumulate}
        Geometry(numel, _CHUNK).launch(_decode_half, payload, *arguments, **constants)


def cast_reduce(payloads, numel, kind, block, out):
    ranks, size = payloads.shape
    cut = Geometry(numel, block if kind == "fp8" else _CHUNK)
    if cut.long:
        decode = functools.partial(cast_decode, numel=numel, kind=kind, block=block)
        return cast_encode(mean_of(payloads, numel, decode), kind, block, None, out)
    if kind == "fp8":
        given = *_parts(payloads, numel, block), size, numel, block
        cut.launch(_reduce_fp8, payloads, *given, *_parts(out, numel, block), RANKS=ranks)
    else:
        given = payloads.view(-1).view(torch.int16), size // 2, numel, _CHUNK
        cut.launch(_reduce_half, payloads, *given, out.view(torch.int16), RANKS=ranks, BF16=kind == "bf16")
