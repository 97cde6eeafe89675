"""Triton kernels of the uniform codec; contracts in ops/uniform.py."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .. import layout
from ..layout import SCALE_MAX
from ..reference.uniform import grid
from ._philox import KEY_ARGUMENTS, uniform16, words_of
from ._tile import (
    ELEMENTS,
    Geometry,
    compensate,
    factors,
    load_codes,
    load_x,
    magnitude_bits,
    mode_of,
    moments,
    place,
    remember,
    store_codes,
    write,
)

_INF, _INF_BITS, _SCALE_MAX = tl.constexpr(float("inf")), tl.constexpr(0x7F800000), tl.constexpr(SCALE_MAX)


@triton.jit
def _scale(p, levels, L2: tl.constexpr):
    """Scale of each row: a norm, NaN for a row with NaN or Inf, zero where ``levels / norm`` overflows."""
    largest = tl.max(magnitude_bits(p), axis=1)
    norm = largest.to(tl.float32, bitcast=True)
    if L2:
        wide = p.to(tl.float64)
        norm = tl.sqrt(tl.sum(wide * wide, axis=1)).to(tl.float32)
    norm = tl.where(norm < _SCALE_MAX, norm, _SCALE_MAX)
    norm = tl.where(tl.div_rn(levels, norm) < _INF, norm, 0.0)
    return tl.where(largest < _INF_BITS, norm, float("nan"))


@triton.jit
def _finish(
    scales, words, row, column, index, inside, value, old, p, updated, decay, sent, numel, block,
    seed, tensor, first, step, rank, stream,
    BITS: tl.constexpr, L2: tl.constexpr, STOCHASTIC: tl.constexpr,
    MEMORY: tl.constexpr, GIVEN: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """From the compensated tile to payload and memory. ``GIVEN``: the scales stand in the payload already."""
    exists = row * block < numel
    levels = tl.zeros([ROWS], tl.float32) + ((1 << (BITS - 1)) - 1)
    if GIVEN:
        scale = tl.load(scales + row, mask=exists, other=0.0)
    else:
        scale = _scale(p, levels, L2)
        tl.store(scales + row, scale, mask=exists)
    live = scale > 0  # false for NaN
    inverse = tl.where(live, tl.div_rn(levels, tl.where(live, scale, 1.0)), 0.0)
    if STOCHASTIC:
        EIGHTH: tl.constexpr = COLUMNS // 8
        counter = row[:, None] * (block // 8) + (tl.min(column, axis=0) // 8 + tl.arange(0, EIGHTH))[None, :]
        h = uniform16(counter, seed, tensor, first, step, rank, stream)
        u = h.to(tl.float32) * 0.0000152587890625 + 0.00000762939453125  # (h + 1/2) / 65536, exact
    else:
        u = tl.zeros([ROWS, COLUMNS], tl.float32) + 0.5
    top = levels[:, None]
    z = tl.floor(tl.where(live[:, None], p, 0.0) * inverse[:, None] + u)
    z = tl.minimum(tl.maximum(z, -top), top)
    codes = tl.where(inside, z, 0.0).to(tl.int32)
    store_codes(words, row, column, block, numel, codes, BITS, ROWS, COLUMNS)
    if MEMORY:
        q = z * tl.div_rn(scale, levels)[:, None]
        remember(updated, index, inside, (scale == scale)[:, None], value, old, q, decay, sent, MEMORY)


@triton.jit(do_not_specialize=KEY_ARGUMENTS)
def _encode(
    x, stride, r, updated, alpha, decay, sent, numel, block, scales, words,
    seed, tensor, first, step, rank, stream, tiles,
    BITS: tl.constexpr, L2: tl.constexpr, STOCHASTIC: tl.constexpr,
    MEMORY: tl.constexpr, GIVEN: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row, column, index, inside = place(tiles, block, numel, ROWS, COLUMNS)
    value = load_x(x, stride, index, inside)
    old, p = compensate(value, r, alpha, index, inside, MEMORY)
    _finish(
        scales, words, row, column, index, inside, value, old, p, updated, decay, sent, numel, block,
        seed, tensor, first, step, rank, stream, BITS, L2, STOCHASTIC, MEMORY, GIVEN, ROWS, COLUMNS,
    )  # fmt: skip


@triton.jit
def _decode_tile(scales, words, row, index, inside, block, numel, BITS: tl.constexpr):
    scale = tl.load(scales + row, mask=row * block < numel, other=0.0)
    step = tl.div_rn(scale, tl.zeros_like(scale) + ((1 << (BITS - 1)) - 1))
    code = load_codes(words, index, inside, BITS)
    HALF: tl.constexpr = 1 << (BITS - 1)
    return ((code ^ HALF) - HALF).to(tl.float32) * step[:, None]


@triton.jit
def _mean_tile(scales, words, size, ranks, row, index, inside, block, numel, BITS: tl.constexpr):
    """Average of the payloads; ``size``: words between two of them."""
    value = _decode_tile(scales, words, row, index, inside, block, numel, BITS)
    for _ in range(1, ranks):
        scales += size
        words += size
        value += _decode_tile(scales, words, row, index, inside, block, numel, BITS)
    return tl.where(inside, tl.div_rn(value, tl.zeros_like(value) + ranks), 0.0)


@triton.jit
def _average(
    scales, words, size, ranks, out, numel, block, tiles,
    BITS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row, column, index, inside = place(tiles, block, numel, ROWS, COLUMNS)
    mean = _mean_tile(scales, words, size, ranks, row, index, inside, block, numel, BITS)
    tl.store(out + index, mean, mask=inside)


@triton.jit(do_not_specialize=KEY_ARGUMENTS)
def _reduce(
    in_scales, in_words, size, ranks, numel, block, scales, words,
    seed, tensor, first, step, rank, stream, tiles,
    BITS: tl.constexpr, L2: tl.constexpr, STOCHASTIC: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row, column, index, inside = place(tiles, block, numel, ROWS, COLUMNS)
    value = _mean_tile(in_scales, in_words, size, ranks, row, index, inside, block, numel, BITS)
    _finish(
        scales, words, row, column, index, inside, value, value, value, scales, 1.0, 1.0, numel, block,
        seed, tensor, first, step, rank, stream, BITS, L2, STOCHASTIC, 0, False, ROWS, COLUMNS,
    )  # fmt: skip


@triton.jit
def _decode(
    scales, words, out, weight, numel, block, tiles,
    BITS: tl.constexpr, ACCUMULATE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row, column, index, inside = place(tiles, block, numel, ROWS, COLUMNS)
    write(out, index, inside, _decode_tile(scales, words, row, index, inside, block, numel, BITS), weight, ACCUMULATE)


@triton.jit(do_not_specialize=KEY_ARGUMENTS)
def _round(
    x, out, inverse, width, levels, numel, block, seed, tensor, first, step, rank, stream, tiles,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row, column, index, inside = place(tiles, block, numel, ROWS, COLUMNS)
    counter = row[:, None] * (block // 8) + (tl.min(column, axis=0) // 8 + tl.arange(0, COLUMNS // 8))[None, :]
    h = uniform16(counter, seed, tensor, first, step, rank, stream)
    u = h.to(tl.float32) * 0.0000152587890625 + 0.00000762939453125  # (h + 1/2) / 65536, exact
    z = tl.floor(load_x(x, 1, index, inside) * inverse + u)
    tl.store(out + index, tl.minimum(tl.maximum(z, -levels), levels) * width, mask=inside)


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
    arguments = x, x.stride(0), *factors(x, memory), numel, block, scales, words, *words_of(key)
    cut.launch(_encode, x, *arguments, GIVEN=cut.long, **constants)


def uniform_decode(payload, numel, bits, block, out, weight, accumulate):
    scales, words = layout.split(payload, layout.blocks(numel, block))
    arguments = scales, words, out, float(weight), numel, block
    Geometry(numel, block).launch(_decode, payload, *arguments, BITS=bits, ACCUMULATE=accumulate)


def uniform_reduce(payloads, numel, bits, block, key, l2, out):
    cut = Geometry(numel, block)
    if cut.long:  # the scale of a long block takes a pass of its own, over the average
        average = torch.empty(numel, dtype=torch.float32, device=payloads.device)
        uniform_average(payloads, numel, bits, block, average)
        return uniform_encode(average, bits, block, key, l2, None, out)
    scales, words = layout.split(out, layout.blocks(numel, block))
    in_scales, in_words = layout.split(payloads, layout.blocks(numel, block))
    given = in_scales, in_words, payloads.shape[1] // 4, len(payloads)
    arguments = *given, numel, block, scales, words, *words_of(key)
    cut.launch(_reduce, payloads, *arguments, BITS=bits, L2=l2, STOCHASTIC=key is not None)


def uniform_average(payloads, numel, bits, block, out):
    scales, words = layout.split(payloads, layout.blocks(numel, block))
    arguments = scales, words, payloads.shape[1] // 4, len(payloads), out, numel, block
    Geometry(numel, block).launch(_average, payloads, *arguments, BITS=bits)


def uniform_round(x, bits, scale, key, out):
    arguments = x.detach(), out.detach(), *grid(bits, scale), float(layout.uniform_levels(bits)), x.numel(), ELEMENTS
    Geometry(x.numel(), ELEMENTS).launch(_round, x, *arguments, *words_of(key))
