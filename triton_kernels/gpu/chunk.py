"""Chunk-wise arg-max on the GPU: one pass that reads x and r, finds or is given an index, and writes r back."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from ._tile import factors, magnitude_bits, mode_of, widened

TILE = 4096  # elements a program holds in registers
INFINITE = tl.constexpr(0x7F800000)  # fp32 +Inf; as integers, magnitudes keep their order and NaN comes after Inf
_MANY = tl.constexpr(1 << 30)  # more elements than a tile has


@triton.jit
def _read(pointer, at, stride, column, left, full):
    """Zeros where nothing is; accesses are as wide as they can be where all chunks of a program are whole."""
    if full:
        value = tl.load(pointer + at * stride, mask=column, other=0)
    else:
        value = tl.load(pointer + at * stride, mask=column & (at < left), other=0)
    return value


@triton.jit
def _tile_kernel(
    x, stride, r, updated, alpha, decay, sent, indices, values, numel, units,
    UNIT: tl.constexpr, MEMORY: tl.constexpr, GIVEN: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """ROWS whole chunks a program, each in one row of WIDTH lanes, of which ``units * UNIT`` are the chunk's."""
    chunk = units * UNIT
    head = tl.program_id(0).to(tl.int64) * ROWS
    base = head * chunk
    left = tl.minimum(numel - base, _MANY).to(tl.int32)
    full = left >= ROWS * chunk
    offset = tl.arange(0, WIDTH)[None, :]
    at = tl.arange(0, ROWS)[:, None] * chunk + offset
    column = tl.broadcast_to(offset < chunk, [ROWS, WIDTH])
    row = head + tl.arange(0, ROWS)
    exists = tl.arange(0, ROWS) * chunk < left
    value = widened(_read(x + base * stride, at, stride, column, left, full))
    p, old = value, value
    if MEMORY:
        old = _read(r + base, at, 1, column, left, full)
        p = value + alpha * old
    magnitude = magnitude_bits(p)
    top = tl.max(magnitude, axis=1)
    finite = top < INFINITE
    if GIVEN:
        index = tl.load(indices + row, mask=exists, other=0)
    else:
        # Lanes beyond the end hold 0 and stand behind every real lane, so they cannot be the lowest index.
        index = tl.min(tl.where(magnitude == top[:, None], offset, WIDTH), axis=1)
        index = tl.where(finite, index, 0)
        tl.store(indices + row, index, mask=exists)
    chosen = column & (offset == index[:, None])
    picked = tl.sum(tl.where(chosen, p.to(tl.int32, bitcast=True), 0), axis=1)  # a sum of bit patterns keeps -0.0
    picked = tl.where(finite, picked.to(tl.float32, bitcast=True), float("nan"))
    tl.store(values + row, picked, mask=exists)
    if MEMORY:
        new = (decay * old + value) - sent * tl.where(chosen, p, 0.0)
        new = tl.where(finite[:, None], new, old)
        if full:
            tl.store(updated + base + at, new, mask=column)
        else:
            tl.store(updated + base + at, new, mask=column & (at < left))


@triton.jit
def _at(x, stride, r, alpha, element, real, MEMORY: tl.constexpr):
    """``(x, r, p = x + alpha * r)`` in fp32; zeros where not real."""
    value = widened(tl.load(x + element * stride, mask=real, other=0))
    old, p = value, value
    if MEMORY:
        old = tl.load(r + element, mask=real, other=0.0)
        p = value + alpha * old
    return value, old, p


@triton.jit
def _loop_kernel(
    x, stride, r, updated, alpha, decay, sent, indices, values, numel, chunk,
    MEMORY: tl.constexpr, GIVEN: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """One chunk a program, WIDTH lanes at a time: for chunks too long for registers, at the price of a second pass."""
    row = tl.program_id(0).to(tl.int64)
    base = row * chunk
    stop = tl.minimum(numel - base, chunk).to(tl.int32)
    lane = tl.arange(0, WIDTH)
    top = tl.full([WIDTH], -1, tl.int32)
    best = tl.zeros([WIDTH], tl.int32)
    bits = tl.zeros([WIDTH], tl.int32)  # of p at best: a second load would race with the stores below
    given = tl.load(indices + row) if GIVEN else 0
    for start in range(0, stop, WIDTH):
        offset = start + lane
        _, _, p = _at(x, stride, r, alpha, base + offset, offset < stop, MEMORY)
        magnitude = magnitude_bits(p)
        larger = magnitude > top  # strictly, so that each lane keeps its lowest index
        top = tl.where(larger, magnitude, top)
        wanted = (offset == given) & (offset < stop) if GIVEN else larger
        best = tl.where(wanted, offset, best)
        bits = tl.where(wanted, p.to(tl.int32, bitcast=True), bits)
    peak = tl.max(top, axis=0)
    finite = peak < INFINITE
    if GIVEN:
        index = given
        value_bits = tl.sum(bits, axis=0)
    else:
        first = tl.min(tl.where(top == peak, best, stop), axis=0)
        value_bits = tl.sum(tl.where(best == first, bits, 0), axis=0)
        index = tl.where(finite, first, 0)
        tl.store(indices + row, index)
    tl.store(values + row, tl.where(finite, value_bits.to(tl.float32, bitcast=True), float("nan")))
    if MEMORY:
        if finite:
            for start in range(0, stop, WIDTH):
                offset = start + lane
                inside = offset < stop
                value, old, p = _at(x, stride, r, alpha, base + offset, inside, MEMORY)
                q = tl.where(offset == index, p, 0.0)
                tl.store(updated + base + offset, (decay * old + value) - sent * q, mask=inside)
        else:
            if MEMORY == 2:
                for start in range(0, stop, WIDTH):
                    inside = start + lane < stop
                    old = tl.load(r + base + start + lane, mask=inside)
                    tl.store(updated + base + start + lane, old, mask=inside)


def chunk_select(x, chunk, memory, indices, values):
    _launch(x, chunk, memory, indices, values, given=False)


def chunk_gather(x, indices, chunk, memory, values):
    _launch(x, chunk, memory, indices.contiguous(), values, given=True)


def _launch(x, chunk, memory, indices, values, given):
    chunks = indices.numel()
    if not chunks:
        return
    arguments = x.detach(), x.stride(0), *factors(x, memory), indices, values, x.numel()
    flags = {"MEMORY": mode_of(memory), "GIVEN": given, "num_warps": 8, "enable_fp_fusion": False}
    with torch.cuda.device_of(x):
        if chunk > TILE:
            _loop_kernel[(chunks,)](*arguments, chunk, WIDTH=TILE, **flags)
        else:
            width = max(4, triton.next_power_of_2(chunk))
            rows = TILE // width
            unit = math.gcd(chunk, 4)  # where chunks start on 128 bits the compiler is to know it
            cut = {"UNIT": unit, "ROWS": rows, "WIDTH": width}
            _tile_kernel[(triton.cdiv(chunks, rows),)](*arguments, chunk // unit, **cut, **flags)
