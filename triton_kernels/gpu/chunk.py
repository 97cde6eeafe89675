"""Chunk-wise arg-max on the GPU: one pass that reads x and r, finds or is given an index, and writes r back."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..checks import check_chunk, check_indices
from ..layout import Memory, blocks, check_input

TILE = 4096  # elements a program holds in registers
INFINITE = tl.constexpr(0x7F800000)  # fp32 +Inf; as integers, magnitudes keep their order and NaN comes after Inf


@triton.jit
def _load(x, r, element, mask, alpha, REMEMBERS: tl.constexpr):
    """(x, r, p) in fp32; zeros where masked."""
    g = tl.load(x + element, mask=mask, other=0.0).to(tl.float32)
    if REMEMBERS:
        residual = tl.load(r + element, mask=mask, other=0.0)
        p = g + alpha * residual
    else:
        residual = g
        p = g
    return g, residual, p


@triton.jit
def _tile_kernel(
    x, r, indices, values, numel, chunk, alpha, decay, sent,
    REMEMBERS: tl.constexpr, GIVEN: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """ROWS whole chunks a program, each in one row of WIDTH >= chunk lanes."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    offset = tl.arange(0, WIDTH)[None, :]
    element = row[:, None] * chunk + offset
    real = (offset < chunk) & (element < numel)
    exists = row * chunk < numel
    g, residual, p = _load(x, r, element, real, alpha, REMEMBERS)
    bits = p.to(tl.int32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    top = tl.max(magnitude, axis=1)
    finite = top < INFINITE
    if GIVEN:
        index = tl.load(indices + row, mask=exists, other=0)
    else:
        # Lanes beyond the end hold 0 and stand behind every real lane, so they cannot be the lowest index.
        index = tl.min(tl.where(magnitude == top[:, None], offset, WIDTH), axis=1)
        index = tl.where(finite, index, 0)
        tl.store(indices + row, index, mask=exists)
    chosen = real & (offset == index[:, None])
    value = tl.sum(tl.where(chosen, bits, 0), axis=1)  # a sum of bit patterns keeps -0.0
    value = tl.where(finite, value, 0x7FC00000).to(tl.float32, bitcast=True)
    tl.store(values + row, value, mask=exists)
    if REMEMBERS:
        updated = decay * residual + g - sent * tl.where(chosen, p, 0.0)
        tl.store(r + element, updated, mask=real & finite[:, None])


@triton.jit
def _loop_kernel(
    x, r, indices, values, numel, chunk, alpha, decay, sent,
    REMEMBERS: tl.constexpr, GIVEN: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """One chunk a program, WIDTH lanes at a time: for chunks too long for registers, at the price of a second pass."""
    row = tl.program_id(0).to(tl.int64)
    base = row * chunk
    stop = tl.minimum(numel - base, chunk).to(tl.int32)
    lane = tl.arange(0, WIDTH)
    top = tl.full([WIDTH], -1, tl.int32)
    best = tl.zeros([WIDTH], tl.int32)
    for start in range(0, stop, WIDTH):
        offset = start + lane
        g, residual, p = _load(x, r, base + offset, offset < stop, alpha, REMEMBERS)
        magnitude = p.to(tl.int32, bitcast=True) & 0x7FFFFFFF
        larger = magnitude > top  # strictly, so that each lane keeps its lowest index
        top = tl.where(larger, magnitude, top)
        best = tl.where(larger, offset, best)
    peak = tl.max(top, axis=0)
    finite = peak < INFINITE
    if GIVEN:
        index = tl.load(indices + row)
    else:
        index = tl.min(tl.where(top == peak, best, stop), axis=0)
        index = tl.where(finite, index, 0)
        tl.store(indices + row, index)
    g, residual, p = _load(x, r, base + index, (index >= 0) & (index < stop), alpha, REMEMBERS)
    tl.store(values + row, tl.where(finite, p, float("nan")))
    if REMEMBERS:
        if finite:
            for start in range(0, stop, WIDTH):
                offset = start + lane
                g, residual, p = _load(x, r, base + offset, offset < stop, alpha, REMEMBERS)
                updated = decay * residual + g - sent * tl.where(offset == index, p, 0.0)
                tl.store(r + base + offset, updated, mask=offset < stop)


def chunk_select(
    x: torch.Tensor,
    chunk: int,
    residual: torch.Tensor | None = None,
    alpha: float = 1.0,
    decay: float = 1.0,
    sent: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    memory = Memory(residual, alpha, decay, sent)
    check_input(x, memory)
    check_chunk(chunk)
    indices = torch.empty(blocks(x.numel(), chunk), dtype=torch.int32, device=x.device)
    return indices, _launch(x, indices, chunk, memory, given=False)


def chunk_gather(
    x: torch.Tensor,
    indices: torch.Tensor,
    chunk: int,
    residual: torch.Tensor | None = None,
    alpha: float = 1.0,
    decay: float = 1.0,
    sent: float = 1.0,
) -> torch.Tensor:
    memory = Memory(residual, alpha, decay, sent)
    check_input(x, memory)
    check_chunk(chunk)
    check_indices(indices, blocks(x.numel(), chunk), x)
    return _launch(x, indices.contiguous(), chunk, memory, given=True)


def _launch(x: torch.Tensor, indices: torch.Tensor, chunk: int, memory: Memory, given: bool) -> torch.Tensor:
    chunks = indices.numel()
    values = torch.empty(chunks, dtype=torch.float32, device=x.device)
    if not chunks:
        return values
    remembers = memory.residual is not None
    x = x.detach().contiguous()
    args = (x, memory.residual if remembers else x, indices, values, x.numel(), chunk, *memory[1:])
    flags = dict(REMEMBERS=remembers, GIVEN=given, enable_fp_fusion=False)
    if chunk > TILE:
        _loop_kernel[(chunks,)](*args, WIDTH=TILE, num_warps=8, **flags)
    else:
        width = max(4, triton.next_power_of_2(chunk))
        rows = TILE // width
        _tile_kernel[(triton.cdiv(chunks, rows),)](*args, ROWS=rows, WIDTH=width, num_warps=8, **flags)
    return values
