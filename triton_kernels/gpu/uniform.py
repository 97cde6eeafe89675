"""Triton kernels of the uniform codec; contracts in ops/uniform.py."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .. import layout
from ..layout import SCALE_MAX
from ..reference.uniform import grid
from ._philox import KEY_ARGUMENTS, uniform16, variate, words_of
from ._tile import (
    Geometry,
    compensate,
    factors,
    load_codes,
    magnitude_bits,
    mode_of,
    moments,
    only,
    over,
    pack,
    pieces,
    place,
    present,
    put,
    read,
    read_x,
    remember,
    row_max,
    row_sum,
    store_pieces,
    write,
)

_INF, _INF_BITS, _SCALE_MAX = tl.constexpr(float("inf")), tl.constexpr(0x7F800000), tl.constexpr(SCALE_MAX)
_LAUNCH = 1024  # elements of a row where there are no blocks


@triton.jit
def _norm(p, L2: tl.constexpr):
    """Norm of each row, at most SCALE_MAX; NaN for a row with NaN or Inf."""
    largest = row_max(magnitude_bits(p))
    norm = largest.to(tl.float32, bitcast=True)
    if L2:
        wide = p.to(tl.float64)
        norm = tl.sqrt(row_sum(wide * wide)).to(tl.float32)
    norm = tl.where(norm < _SCALE_MAX, norm, _SCALE_MAX)
    return tl.where(largest < _INF_BITS, norm, float("nan"))


@triton.jit
def _floor(v, levels, BITS: tl.constexpr):
    """``clip(floor(v), -levels, levels)`` as fp32. Codes of 2 or 4 bits need no clip: |v| is at most ``levels`` times a
    few roundings, plus a variate that is at least 2**-17 away from 0 and from 1.
    """
    if BITS > 4:
        v = tl.minimum(tl.maximum(v, -levels), levels)
    return tl.floor(v)


@triton.jit
def _finish(
    scales, codes, head, origin, octet, within, inside, left, value, old, p, updated, decay, sent, block,
    seed, tensor, first, step, rank, stream,
    BITS: tl.constexpr, L2: tl.constexpr, STOCHASTIC: tl.constexpr,
    MEMORY: tl.constexpr, GIVEN: tl.constexpr, WHOLE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """From the compensated tile to payload and memory. ``GIVEN``: the scales stand in the payload already."""
    row, exists = head + tl.arange(0, ROWS), present(block, left, ROWS)
    LEVELS: tl.constexpr = (1 << (BITS - 1)) - 1
    levels = tl.zeros([ROWS], tl.float32) + LEVELS
    norm = tl.load(scales + row, mask=exists, other=0.0) if GIVEN else _norm(p, L2)
    inverse = tl.div_rn(levels, norm)
    scale = tl.where(inverse == _INF, 0.0, norm)  # what overflows is sent as zeros
    live = inverse < _INF  # false for NaN
    inverse = tl.where(live, inverse, 0.0)
    if not GIVEN:
        tl.store(scales + row, scale, mask=exists)
    u = 0.5
    if STOCHASTIC:
        u = variate(uniform16(origin + octet, seed, tensor, first, step, rank, stream))
    z = _floor(p * inverse[:, None, None] + u, LEVELS * 1.0, BITS)
    piece = tl.where(live[:, None, None], pack(z.to(tl.int32), BITS, True), 0)
    store_pieces(codes, origin, octet, within, left, piece, BITS, WHOLE)
    if MEMORY:
        q = z * tl.div_rn(scale, levels)[:, None, None]
        finite = (scale == scale)[:, None, None]
        remember(updated, origin, octet, inside, left, finite, value, old, q, decay, sent, WHOLE)


@triton.jit(do_not_specialize=KEY_ARGUMENTS)
def _encode(
    x, stride, r, updated, alpha, decay, sent, numel, block, scales, codes,
    seed, tensor, first, step, rank, stream, tiles,
    BITS: tl.constexpr, L2: tl.constexpr, STOCHASTIC: tl.constexpr, MEMORY: tl.constexpr, GIVEN: tl.constexpr,
    WHOLE: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    head, origin, left, octet, within = place(tiles, block, numel, ROWS, LANES)
    inside = within & (8 * octet < left)
    value = read_x(x, stride, origin, octet, inside, left, WHOLE)
    old, p = compensate(value, r, alpha, origin, octet, inside, left, MEMORY, WHOLE)
    _finish(
        scales, codes, head, origin, octet, within, inside, left, value, old, p, updated, decay, sent, block,
        seed, tensor, first, step, rank, stream, BITS, L2, STOCHASTIC, MEMORY, GIVEN, WHOLE, ROWS,
    )  # fmt: skip


@triton.jit
def _decode_tile(
    scales, codes, head, origin, octet, inside, left, block,
    BITS: tl.constexpr, WHOLE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    scale = tl.load(scales + head + tl.arange(0, ROWS), mask=present(block, left, ROWS), other=0.0)
    HALF: tl.constexpr = 1 << (BITS - 1)
    step = tl.div_rn(scale, tl.zeros_like(scale) + (HALF - 1))
    field = load_codes(codes, origin, octet, inside, left, BITS, WHOLE)
    # 2**23 + code + HALF by its bits, exact: faster than a conversion.
    number = ((field & (2 * HALF - 1)) ^ (0x4B000000 + HALF)).to(tl.float32, bitcast=True)
    return (number - (8388608.0 + HALF)) * step[:, None, None]


@triton.jit
def _mean_tile(
    scales, codes, size, head, origin, octet, inside, left, block,
    RANKS: tl.constexpr, BITS: tl.constexpr, WHOLE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Average of the payloads; ``size``: bytes between two of them."""
    value = _decode_tile(scales, codes, head, origin, octet, inside, left, block, BITS, WHOLE, ROWS)
    PIECE: tl.constexpr = codes.dtype.element_ty.primitive_bitwidth // 8
    for _ in range(1, RANKS):
        scales += size // 4
        codes += size // PIECE
        value += _decode_tile(scales, codes, head, origin, octet, inside, left, block, BITS, WHOLE, ROWS)
    return over(value, RANKS)


@triton.jit
def _average(
    scales, codes, size, out, numel, block, tiles,
    RANKS: tl.constexpr, BITS: tl.constexpr, WHOLE: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    head, origin, left, octet, within = place(tiles, block, numel, ROWS, LANES)
    inside = within & (8 * octet < left)
    mean = _mean_tile(scales, codes, size, head, origin, octet, inside, left, block, RANKS, BITS, WHOLE, ROWS)
    write(out + 8 * origin, octet, inside, left, mean, WHOLE)


@triton.jit(do_not_specialize=KEY_ARGUMENTS)
def _reduce(
    in_scales, in_codes, size, numel, block, scales, codes,
    seed, tensor, first, step, rank, stream, tiles,
    RANKS: tl.constexpr, BITS: tl.constexpr, L2: tl.constexpr, STOCHASTIC: tl.constexpr,
    WHOLE: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    head, origin, left, octet, within = place(tiles, block, numel, ROWS, LANES)
    inside = within & (8 * octet < left)
    value = _mean_tile(in_scales, in_codes, size, head, origin, octet, inside, left, block, RANKS, BITS, WHOLE, ROWS)
    value = only(value, octet, inside, left, WHOLE)
    _finish(
        scales, codes, head, origin, octet, within, inside, left, value, value, value, scales, 1.0, 1.0, block,
        seed, tensor, first, step, rank, stream, BITS, L2, STOCHASTIC, 0, False, WHOLE, ROWS,
    )  # fmt: skip


@triton.jit
def _decode(
    scales, codes, out, weight, numel, block, tiles,
    BITS: tl.constexpr, ACCUMULATE: tl.constexpr, WHOLE: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    head, origin, left, octet, within = place(tiles, block, numel, ROWS, LANES)
    inside = within & (8 * octet < left)
    value = _decode_tile(scales, codes, head, origin, octet, inside, left, block, BITS, WHOLE, ROWS)
    put(out, origin, octet, inside, left, value, weight, ACCUMULATE, WHOLE)


@triton.jit(do_not_specialize=KEY_ARGUMENTS)
def _round(
    x, out, inverse, width, levels, numel, block, seed, tensor, first, step, rank, stream, tiles,
    WHOLE: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    head, origin, left, octet, within = place(tiles, block, numel, ROWS, LANES)
    inside = within & (8 * octet < left)
    u = variate(uniform16(origin + octet, seed, tensor, first, step, rank, stream))
    z = tl.floor(read(x + 8 * origin, octet, inside, left, WHOLE) * inverse + u)
    write(out + 8 * origin, octet, inside, left, tl.minimum(tl.maximum(z, -levels), levels) * width, WHOLE)


def _scales_of_long_blocks(x, memory, block, levels, l2):
    """What `_scale` computes, for blocks that no program holds whole."""
    largest, _, squares = moments(x, memory, block)
    norm = squares.sqrt().float() if l2 else largest.view(torch.float32)
    norm = norm.clamp(max=SCALE_MAX)
    norm = torch.where((torch.full_like(norm, levels) / norm).isinf(), 0.0, norm)
    return torch.where(largest < _INF_BITS.value, norm, torch.nan)


def uniform_encode(x, bits, block, key, l2, memory, out):
    numel, cut = x.numel(), Geometry(x.numel(), block)
    scales, words = layout.split(out, layout.blocks(numel, block))
    if cut.long:
        scales.copy_(_scales_of_long_blocks(x, memory, block, layout.uniform_levels(bits), l2))
    constants = {"BITS": bits, "L2": l2, "STOCHASTIC": key is not None, "MEMORY": mode_of(memory)}
    arguments = x, x.stride(0), *factors(x, memory), numel, block, scales, pieces(words, bits), *words_of(key)
    cut.launch(_encode, x, *arguments, GIVEN=cut.long, **constants)


def uniform_decode(payload, numel, bits, block, out, weight, accumulate):
    scales, words = layout.split(payload, layout.blocks(numel, block))
    arguments = scales, pieces(words, bits), out, float(weight), numel, block
    Geometry(numel, block).launch(_decode, payload, *arguments, BITS=bits, ACCUMULATE=accumulate)


def uniform_reduce(payloads, numel, bits, block, key, l2, out):
    cut = Geometry(numel, block)
    if cut.long:  # the scale of a long block takes a pass of its own, over the average
        average = torch.empty(numel, dtype=torch.float32, device=payloads.device)
        uniform_average(payloads, numel, bits, block, average)
        return uniform_encode(average, bits, block, key, l2, None, out)
    scales, words = layout.split(out, layout.blocks(numel, block))
    in_scales, in_words = layout.split(payloads, layout.blocks(numel, block))
    given = in_scales, pieces(in_words, bits), payloads.shape[1], numel, block
    arguments = *given, scales, pieces(words, bits), *words_of(key)
    constants = {"BITS": bits, "L2": l2, "STOCHASTIC": key is not None}
    cut.launch(_reduce, payloads, *arguments, RANKS=len(payloads), **constants)


def uniform_average(payloads, numel, bits, block, out):
    scales, words = layout.split(payloads, layout.blocks(numel, block))
    arguments = scales, pieces(words, bits), payloads.shape[1], out, numel, block
    Geometry(numel, block).launch(_average, payloads, *arguments, RANKS=len(payloads), BITS=bits)


def uniform_round(x, bits, scale, key, out):
    arguments = x.detach(), out.detach(), *grid(bits, scale), float(layout.uniform_levels(bits)), x.numel(), _LAUNCH
    Geometry(x.numel(), _LAUNCH).launch(_round, x, *arguments, *words_of(key))
