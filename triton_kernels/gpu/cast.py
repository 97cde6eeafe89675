"""Triton kernels of the float casts; contracts in reference/cast.py.

bf16 and e4m3 are converted by integer arithmetic, which gives the same bits on every GPU, fp8 unit or not.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .. import layout
from ..layout import Memory
from ..reference._memory import mean_in_rank_order
from ._tile import Geometry, compensate, factors, load_x, magnitude_bits, moments, place, remember, write

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
    """e4m3 bits as int32 (no NaN) -> fp32."""
    magnitude = code & 0x7F
    normal = ((magnitude << 20) + (120 << 23)).to(tl.float32, bitcast=True)
    value = tl.where(magnitude >= 8, normal, magnitude.to(tl.float32) * 0.001953125)
    return (value.to(tl.int32, bitcast=True) | ((code & 0x80) << 24)).to(tl.float32, bitcast=True)


@triton.jit
def _finish_half(codes, index, inside, value, old, p, r, decay, sent, numel, BF16: tl.constexpr, HAS_R: tl.constexpr):
    code = _to_half(p, BF16)
    tl.store(codes + index, code, mask=index < (numel + 1) // 2 * 2)  # the padding is a masked lane: zero
    if HAS_R:
        q = _from_half(code, BF16)
        remember(r, index, inside & (tl.abs(q) < _INF), value, old, q, decay, sent)


@triton.jit
def _encode_half(
    x, stride, r, alpha, decay, sent, numel, block, codes, tiles,
    BF16: tl.constexpr, HAS_R: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row, column, index, inside = place(tiles, block, numel, ROWS, COLUMNS)
    value = load_x(x, stride, index, inside)
    old, p = compensate(value, r, alpha, index, inside, HAS_R)
    _finish_half(codes, index, inside, value, old, p, r, decay, sent, numel, BF16, HAS_R)


@triton.jit
def _reduce_half(
    in_codes, size, ranks, r, alpha, decay, sent, numel, block, codes, tiles,
    BF16: tl.constexpr, HAS_R: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """``size``: codes between two ranks' payloads."""
    row, column, index, inside = place(tiles, block, numel, ROWS, COLUMNS)
    value = _from_half(tl.load(in_codes + index, mask=inside, other=0), BF16)
    for _ in range(1, ranks):
        in_codes += size
        value += _from_half(tl.load(in_codes + index, mask=inside, other=0), BF16)
    value = tl.div_rn(value, tl.zeros_like(value) + ranks)
    old, p = compensate(value, r, alpha, index, inside, HAS_R)
    _finish_half(codes, index, inside, value, old, p, r, decay, sent, numel, BF16, HAS_R)


@triton.jit
def _decode_half(
    codes, out, weight, numel, block, tiles,
    BF16: tl.constexpr, ACCUMULATE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row, column, index, inside = place(tiles, block, numel, ROWS, COLUMNS)
    write(out, index, inside, _from_half(tl.load(codes + index, mask=inside, other=0), BF16), weight, ACCUMULATE)


@triton.jit
def _finish_fp8(
    scales, codes, row, column, index, inside, value, old, p, r, decay, sent, numel, block, absmax,
    HAS_R: tl.constexpr, GIVEN: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """``GIVEN``: the bits of max |p| of every block stand in ``absmax``, because no tile holds a whole block."""
    exists = row * block < numel
    if GIVEN:
        largest = tl.load(absmax + row, mask=exists, other=0)
    else:
        largest = tl.max(magnitude_bits(p), axis=1)
    finite = largest < _INF_BITS
    norm = tl.where(finite, largest, 0).to(tl.float32, bitcast=True)
    top = tl.zeros([ROWS], tl.float32) + 448.0
    inverse = tl.div_rn(top, norm)
    live = inverse < _INF
    scale = tl.where(finite, tl.where(live, tl.div_rn(norm, top), 0.0), float("nan"))
    tl.store(scales + row, scale, mask=exists)  # tiles of one block all write the same value
    live = (live & finite)[:, None]
    code = _to_fp8(tl.where(live, p, 0.0) * tl.where(live, inverse[:, None], 0.0))
    padded = (numel + 3) // 4 * 4
    tl.store(codes + index, code.to(tl.uint8), mask=(column[None, :] < block) & (index < padded))
    if HAS_R:
        remember(r, index, inside & finite[:, None], value, old, _from_fp8(code) * scale[:, None], decay, sent)


@triton.jit
def _encode_fp8(
    x, stride, r, alpha, decay, sent, numel, block, scales, codes, absmax, tiles,
    HAS_R: tl.constexpr, GIVEN: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row, column, index, inside = place(tiles, block, numel, ROWS, COLUMNS)
    value = load_x(x, stride, index, inside)
    old, p = compensate(value, r, alpha, index, inside, HAS_R)
    _finish_fp8(
        scales, codes, row, column, index, inside, value, old, p, r, decay, sent, numel, block, absmax,
        HAS_R, GIVEN, ROWS, COLUMNS,
    )  # fmt: skip


@triton.jit
def _decode_tile(scales, codes, row, index, inside, block, numel):
    scale = tl.load(scales + row, mask=row * block < numel, other=0.0)
    return _from_fp8(tl.load(codes + index, mask=inside, other=0).to(tl.int32)) * scale[:, None]


@triton.jit
def _reduce_fp8(
    in_scales, in_codes, size, ranks, r, alpha, decay, sent, numel, block, scales, codes, tiles,
    HAS_R: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """``size``: bytes between two ranks' payloads."""
    row, column, index, inside = place(tiles, block, numel, ROWS, COLUMNS)
    value = _decode_tile(in_scales, in_codes, row, index, inside, block, numel)
    for _ in range(1, ranks):
        in_scales += size // 4
        in_codes += size
        value += _decode_tile(in_scales, in_codes, row, index, inside, block, numel)
    value = tl.where(inside, tl.div_rn(value, tl.zeros_like(value) + ranks), 0.0)
    old, p = compensate(value, r, alpha, index, inside, HAS_R)
    _finish_fp8(
        scales, codes, row, column, index, inside, value, old, p, r, decay, sent, numel, block, scales,
        HAS_R, False, ROWS, COLUMNS,
    )  # fmt: skip


@triton.jit
def _decode_fp8(
    scales, codes, out, weight, numel, block, tiles,
    ACCUMULATE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row, column, index, inside = place(tiles, block, numel, ROWS, COLUMNS)
    write(out, index, inside, _decode_tile(scales, codes, row, index, inside, block, numel), weight, ACCUMULATE)


def _parts(payload, numel, block):
    """``(scales fp32, code bytes)`` of fp8 payloads."""
    scales, words = layout.split(payload, layout.blocks(numel, block))
    return scales, words.view(torch.uint8)


def cast_encode(x, kind, block, residual=None, alpha=1.0, decay=1.0, sent=1.0, out=None):
    memory = Memory(residual, alpha, decay, sent)
    layout.check_kind(kind)
    layout.check_block(block)
    layout.check_input(x, memory)
    numel, has_r = x.numel(), residual is not None
    out = layout.payload_for(out, layout.cast_bytes(numel, kind, block), x)
    source = x, x.stride(0), *factors(x, memory), numel
    if kind == "fp8":
        cut = Geometry(numel, block)
        scales, codes = _parts(out, numel, block)
        absmax = moments(x, memory, block)[0] if cut.long else scales
        cut.launch(_encode_fp8, x, *source, block, scales, codes, absmax, HAS_R=has_r, GIVEN=cut.long)
    else:
        codes = out.view(torch.int16)
        Geometry(numel, _CHUNK).launch(_encode_half, x, *source, _CHUNK, codes, BF16=kind == "bf16", HAS_R=has_r)
    return out


def cast_decode(payload, numel, kind, block, out=None, weight=1.0, accumulate=False):
    layout.check_kind(kind)
    layout.check_block(block)
    layout.check_payload(payload, layout.cast_bytes(numel, kind, block))
    out = layout.result_for(out, numel, payload, accumulate)
    if kind == "fp8":
        arguments = *_parts(payload, numel, block), out, float(weight), numel, block
        Geometry(numel, block).launch(_decode_fp8, payload, *arguments, ACCUMULATE=accumulate)
    elif numel:
        arguments = payload.view(torch.int16), out, float(weight), numel, _CHUNK
        constants = {"BF16": kind == "bf16", "ACCUMULATE": accumulate}
        Geometry(numel, _CHUNK).launch(_decode_half, payload, *arguments, **constants)
    return out


def cast_reduce(payloads, numel, kind, block, out=None, *, residual=None, alpha=1.0, decay=1.0, sent=1.0):
    memory = Memory(residual, alpha, decay, sent)
    layout.check_kind(kind)
    layout.check_block(block)
    layout.check_payloads(payloads, layout.cast_bytes(numel, kind, block))
    layout.check_residual(memory, payloads, numel)
    (ranks, size), has_r = payloads.shape, residual is not None
    cut = Geometry(numel, block if kind == "fp8" else _CHUNK)
    if cut.long:  # the scale of a long block takes a pass of its own, over the average
        average = mean_in_rank_order([cast_decode(payload, numel, kind, block) for payload in payloads])
        return cast_encode(average, kind, block, residual, alpha, decay, sent, out)
    out = layout.payload_for(out, size, payloads)
    memory_arguments = *factors(payloads, memory), numel
    if kind == "fp8":
        given = *_parts(payloads, numel, block), size, ranks, *memory_arguments, block
        cut.launch(_reduce_fp8, payloads, *given, *_parts(out, numel, block), HAS_R=has_r)
    else:
        given = payloads.view(-1).view(torch.int16), size // 2, ranks, *memory_arguments, _CHUNK
        cut.launch(_reduce_half, payloads, *given, out.view(torch.int16), BF16=kind == "bf16", HAS_R=has_r)
    return out
