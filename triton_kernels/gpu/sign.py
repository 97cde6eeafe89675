"""Triton kernels of the sign codec; contracts in ops/sign.py."""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

from .. import layout
from ..layout import SCALE_MAX
from ._philox import KEY_ARGUMENTS, words32, words_of
from ._tile import (
    MAX_COLUMNS,
    Geometry,
    compensate,
    factors,
    load_codes,
    load_x,
    mean_of,
    mode_of,
    moments,
    place,
    remember,
    store_codes,
    write,
)

_INF = tl.constexpr(float("inf"))
_INF_BITS = 0x7F800000


@triton.jit
def _finish(
    scales, words, row, column, index, inside, value, old, p, updated, decay, sent, numel, block,
    MEMORY: tl.constexpr, GIVEN: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """From the compensated tile to payload and memory. ``GIVEN``: the scales stand in the payload already."""
    exists = row * block < numel
    if GIVEN:
        scale = tl.load(scales + row, mask=exists, other=0.0)
    else:
        total = tl.sum(tl.abs(p).to(tl.float64), axis=1)
        count = tl.maximum(tl.minimum(numel - row * block, block), 1)
        scale = tl.where(total < _INF, (total / count.to(tl.float64)).to(tl.float32), float("nan"))
        tl.store(scales + row, scale, mask=exists)
    positive = (p >= 0) & inside
    store_codes(words, row, column, block, numel, positive.to(tl.int32), 1, ROWS, COLUMNS)
    if MEMORY:
        q = tl.where(positive, scale[:, None], -scale[:, None])
        remember(updated, index, inside, (scale == scale)[:, None], value, old, q, decay, sent, MEMORY)


@triton.jit
def _encode(
    x, stride, r, updated, alpha, decay, sent, numel, block, scales, words, tiles,
    MEMORY: tl.constexpr, GIVEN: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row, column, index, inside = place(tiles, block, numel, ROWS, COLUMNS)
    value = load_x(x, stride, index, inside)
    old, p = compensate(value, r, alpha, index, inside, MEMORY)
    _finish(
        scales, words, row, column, index, inside, value, old, p, updated, decay, sent, numel, block,
        MEMORY, GIVEN, ROWS, COLUMNS,
    )  # fmt: skip


@triton.jit
def _decode_tile(scales, words, row, index, inside, block, numel):
    scale = tl.load(scales + row, mask=row * block < numel, other=0.0)[:, None]
    return tl.where(load_codes(words, index, inside, 1) == 1, scale, -scale)


@triton.jit
def _reduce(
    in_scales, in_words, size, ranks, numel, block, scales, words, tiles,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """``size``: words between two ranks' payloads."""
    row, column, index, inside = place(tiles, block, numel, ROWS, COLUMNS)
    value = _decode_tile(in_scales, in_words, row, index, inside, block, numel)
    for _ in range(1, ranks):
        in_scales += size
        in_words += size
        value += _decode_tile(in_scales, in_words, row, index, inside, block, numel)
    value = tl.where(inside, tl.div_rn(value, tl.zeros_like(value) + ranks), 0.0)
    _finish(
        scales, words, row, column, index, inside, value, value, value, scales, 1.0, 1.0, numel, block,
        0, False, ROWS, COLUMNS,
    )  # fmt: skip


@triton.jit
def _decode(
    scales, words, out, weight, numel, block, tiles,
    ACCUMULATE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row, column, index, inside = place(tiles, block, numel, ROWS, COLUMNS)
    write(out, index, inside, _decode_tile(scales, words, row, index, inside, block, numel), weight, ACCUMULATE)


@triton.jit
def _vote(ballots, size, ranks, numel, block, words, tiles, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    row, column, index, inside = place(tiles, block, numel, ROWS, COLUMNS)
    votes = load_codes(ballots, index, inside, 1)
    for _ in range(1, ranks):
        ballots += size
        votes += load_codes(ballots, index, inside, 1)
    won = (2 * votes >= ranks) & inside
    store_codes(words, row, column, block, numel, won.to(tl.int32), 1, ROWS, COLUMNS)


@triton.jit(do_not_specialize=KEY_ARGUMENTS)
def _draw(
    x, stride, numel, block, scale, words, seed, tensor, first, step, rank, stream, tiles,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row, column, index, inside = place(tiles, block, numel, ROWS, COLUMNS)
    QUARTER: tl.constexpr = COLUMNS // 4
    counter = row[:, None] * (block // 4) + (tl.min(column, axis=0) // 4 + tl.arange(0, QUARTER))[None, :]
    draw = words32(counter, seed, tensor, first, step, rank, stream).to(tl.int32, bitcast=True)
    threshold = draw.to(tl.float32) * 4.656612873077393e-10 * tl.load(scale)  # 2**-31
    positive = (load_x(x, stride, index, inside) >= threshold) & inside
    store_codes(words, row, column, block, numel, positive.to(tl.int32), 1, ROWS, COLUMNS)


def sign_encode(x, block, memory, out):
    numel, cut = x.numel(), Geometry(x.numel(), block)
    scales, words = layout.split(out, layout.blocks(numel, block))
    if cut.long:
        _, magnitudes, _ = moments(x, memory, block)
        starts = torch.arange(0, numel, block, device=x.device)
        mean = magnitudes / (numel - starts).clamp(max=block)
        scales.copy_(torch.where(mean.isfinite(), mean, torch.nan))
    arguments = x, x.stride(0), *factors(x, memory), numel, block, scales, words
    cut.launch(_encode, x, *arguments, MEMORY=mode_of(memory), GIVEN=cut.long)


def sign_decode(payload, numel, block, out, weight, accumulate):
    scales, words = layout.split(payload, layout.blocks(numel, block))
    arguments = scales, words, out, float(weight), numel, block
    Geometry(numel, block).launch(_decode, payload, *arguments, ACCUMULATE=accumulate)


def sign_reduce(payloads, numel, block, out):
    cut = Geometry(numel, block)
    if cut.long:
        decode = functools.partial(sign_decode, numel=numel, block=block)
        return sign_encode(mean_of(payloads, numel, decode), block, None, out)
    scales, words = layout.split(out, layout.blocks(numel, block))
    in_scales, in_words = layout.split(payloads, layout.blocks(numel, block))
    arguments = in_scales, in_words, payloads.shape[1] // 4, len(payloads), numel, block, scales, words
    cut.launch(_reduce, payloads, *arguments)


def sign_vote(payloads, numel, out):
    ballots, words = payloads.view(-1).view(torch.int32), out.view(torch.int32)
    block = 1024  # of the launch only
    arguments = ballots, payloads.shape[1] // 4, len(payloads), numel, block, words
    Geometry(numel, block).launch(_vote, payloads, *arguments)


def sign_draw(x, key, out):
    numel = x.numel()
    if numel:
        scale, words = layout.split(out, 1)
        largest, _, squares = moments(x, None, MAX_COLUMNS)  # partial results, one per tile
        norm = squares.sum().sqrt().clamp(max=SCALE_MAX)
        scale.copy_(torch.where(largest.amax() < _INF_BITS, norm, torch.nan))
        block = 1024  # of the launch only
        key_words = words_of(key._replace(offset=2 * key.offset))
        Geometry(numel, block).launch(_draw, x, x, x.stride(0), numel, block, scale, words, *key_words)
