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
    mean_of,
    mode_of,
    moments,
    ones,
    only,
    over,
    pack,
    pieces,
    place,
    present,
    put,
    read_x,
    remember,
    row_sum,
    store_pieces,
)

_INF = tl.constexpr(float("inf"))
_INF_BITS = 0x7F800000
_LAUNCH = 1024  # elements of a row where there are no blocks


@triton.jit
def _finish(
    scales, codes, head, origin, octet, within, inside, left, value, old, p, updated, decay, sent, block,
    MEMORY: tl.constexpr, GIVEN: tl.constexpr, WHOLE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """From the compensated tile to payload and memory. ``GIVEN``: the scales stand in the payload already."""
    row, exists = head + tl.arange(0, ROWS), present(block, left, ROWS)
    if GIVEN:
        scale = tl.load(scales + row, mask=exists, other=0.0)
    else:
        total = row_sum(tl.abs(p).to(tl.float64))
        count = tl.maximum(tl.minimum(left - tl.arange(0, ROWS) * block, block), 1)
        scale = tl.where(total < _INF, (total / count.to(tl.float64)).to(tl.float32), float("nan"))
        tl.store(scales + row, scale, mask=exists)
    positive = p >= 0
    piece = pack(positive.to(tl.int32), 1, False) & ones(octet, left)
    store_pieces(codes, origin, octet, within, left, piece, 1, WHOLE)
    if MEMORY:
        q = tl.where(positive, scale[:, None, None], -scale[:, None, None])
        finite = (scale == scale)[:, None, None]
        remember(updated, origin, octet, inside, left, finite, value, old, q, decay, sent, WHOLE)


@triton.jit
def _encode(
    x, stride, r, updated, alpha, decay, sent, numel, block, scales, codes, tiles,
    MEMORY: tl.constexpr, GIVEN: tl.constexpr, WHOLE: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    head, origin, left, octet, within = place(tiles, block, numel, ROWS, LANES)
    inside = within & (8 * octet < left)
    value = read_x(x, stride, origin, octet, inside, left, WHOLE)
    old, p = compensate(value, r, alpha, origin, octet, inside, left, MEMORY, WHOLE)
    _finish(
        scales, codes, head, origin, octet, within, inside, left, value, old, p, updated, decay, sent, block,
        MEMORY, GIVEN, WHOLE, ROWS,
    )  # fmt: skip


@triton.jit
def _decode_tile(scales, codes, head, origin, octet, inside, left, block, WHOLE: tl.constexpr, ROWS: tl.constexpr):
    scale = tl.load(scales + head + tl.arange(0, ROWS), mask=present(block, left, ROWS), other=0.0)[:, None, None]
    # The bit goes to the place of the sign, inverted.
    sign = (load_codes(codes, origin, octet, inside, left, 1, WHOLE) << 31) ^ -0x80000000
    return (scale.to(tl.int32, bitcast=True) ^ sign).to(tl.float32, bitcast=True)


@triton.jit
def _reduce(
    in_scales, in_codes, size, numel, block, scales, codes, tiles,
    RANKS: tl.constexpr, WHOLE: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """``size``: words between two ranks' payloads."""
    head, origin, left, octet, within = place(tiles, block, numel, ROWS, LANES)
    inside = within & (8 * octet < left)
    value = _decode_tile(in_scales, in_codes, head, origin, octet, inside, left, block, WHOLE, ROWS)
    for _ in range(1, RANKS):
        in_scales += size
        in_codes += 4 * size
        value += _decode_tile(in_scales, in_codes, head, origin, octet, inside, left, block, WHOLE, ROWS)
    value = only(over(value, RANKS), octet, inside, left, WHOLE)
    _finish(
        scales, codes, head, origin, octet, within, inside, left, value, value, value, scales, 1.0, 1.0, block,
        0, False, WHOLE, ROWS,
    )  # fmt: skip


@triton.jit
def _decode(
    scales, codes, out, weight, numel, block, tiles,
    ACCUMULATE: tl.constexpr, WHOLE: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    head, origin, left, octet, within = place(tiles, block, numel, ROWS, LANES)
    inside = within & (8 * octet < left)
    value = _decode_tile(scales, codes, head, origin, octet, inside, left, block, WHOLE, ROWS)
    put(out, origin, octet, inside, left, value, weight, ACCUMULATE, WHOLE)


@triton.jit
def _vote(
    ballots, size, numel, block, codes, tiles,
    RANKS: tl.constexpr, WHOLE: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """``size``: bytes between two ranks' payloads."""
    head, origin, left, octet, within = place(tiles, block, numel, ROWS, LANES)
    inside = within & (8 * octet < left)
    votes = load_codes(ballots, origin, octet, inside, left, 1, WHOLE) & 1
    for _ in range(1, RANKS):
        ballots += size
        votes += load_codes(ballots, origin, octet, inside, left, 1, WHOLE) & 1
    piece = pack((2 * votes >= RANKS).to(tl.int32), 1, False) & ones(octet, left)
    store_pieces(codes, origin, octet, within, left, piece, 1, WHOLE)


@triton.jit(do_not_specialize=KEY_ARGUMENTS)
def _draw(
    x, stride, numel, block, scale, codes, seed, tensor, first, step, rank, stream, tiles,
    WHOLE: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Two counters serve an octet, with 32 bits for each element."""
    head, origin, left, octet, within = place(tiles, block, numel, ROWS, LANES)
    inside = within & (8 * octet < left)
    even = words32(2 * (origin + octet), seed, tensor, first, step, rank, stream)
    odd = words32(2 * (origin + octet) + 1, seed, tensor, first, step, rank, stream)
    draw = tl.join(even, odd).permute(0, 1, 3, 2).reshape(ROWS, LANES, 8).to(tl.int32, bitcast=True)
    threshold = draw.to(tl.float32) * 4.656612873077393e-10 * tl.load(scale)  # 2**-31
    positive = read_x(x, stride, origin, octet, inside, left, WHOLE) >= threshold
    piece = pack(positive.to(tl.int32), 1, False) & ones(octet, left)
    store_pieces(codes, origin, octet, within, left, piece, 1, WHOLE)


def sign_encode(x, block, memory, out):
    numel, cut = x.numel(), Geometry(x.numel(), block)
    scales, words = layout.split(out, layout.blocks(numel, block))
    if cut.long:
        _, magnitudes, _ = moments(x, memory, block)
        starts = torch.arange(0, numel, block, device=x.device)
        mean = magnitudes / (numel - starts).clamp(max=block)
        scales.copy_(torch.where(mean.isfinite(), mean, torch.nan))
    arguments = x, x.stride(0), *factors(x, memory), numel, block, scales, pieces(words, 1)
    cut.launch(_encode, x, *arguments, MEMORY=mode_of(memory), GIVEN=cut.long)


def sign_decode(payload, numel, block, out, weight, accumulate):
    scales, words = layout.split(payload, layout.blocks(numel, block))
    arguments = scales, pieces(words, 1), out, float(weight), numel, block
    Geometry(numel, block).launch(_decode, payload, *arguments, ACCUMULATE=accumulate)


def sign_reduce(payloads, numel, block, out):
    cut = Geometry(numel, block)
    if cut.long:
        decode = functools.partial(sign_decode, numel=numel, block=block)
        return sign_encode(mean_of(payloads, numel, decode), block, None, out)
    scales, words = layout.split(out, layout.blocks(numel, block))
    in_scales, in_words = layout.split(payloads, layout.blocks(numel, block))
    given = in_scales, pieces(in_words, 1), payloads.shape[1] // 4, numel, block
    cut.launch(_reduce, payloads, *given, scales, pieces(words, 1), RANKS=len(payloads))


def sign_vote(payloads, numel, out):
    arguments = payloads, payloads.shape[1], numel, _LAUNCH, out
    Geometry(numel, _LAUNCH).launch(_vote, payloads, *arguments, RANKS=len(payloads))


def sign_draw(x, key, out):
    numel = x.numel()
    if numel:
        scale, words = layout.split(out, 1)
        largest, _, squares = moments(x, None, MAX_COLUMNS)  # partial results, one per tile
        norm = squares.sum().sqrt().clamp(max=SCALE_MAX)
        scale.copy_(torch.where(largest.amax() < _INF_BITS, norm, torch.nan))
        key_words = words_of(key._replace(offset=2 * key.offset))
        arguments = x, x.stride(0), numel, _LAUNCH, scale, pieces(words, 1), *key_words
        Geometry(numel, _LAUNCH).launch(_draw, x, *arguments)
