"""Chunk-wise arg-max on the CPU: groups of whole chunks that stay in the second-level cache, read once from memory."""

from __future__ import annotations

import numpy as np
import torch

from ..checks import check_chunk, check_indices
from ..layout import Memory, blocks, check_input
from ._jit import jit

GROUP = 8192  # elements; x, r and p of a group take 96 KiB
MAGNITUDE = np.int32(
    0x7FFFFFFF
)  # fp32 without its sign: as integers, magnitudes keep their order and NaN and Inf come last
INFINITE = np.int32(0x7F800000)


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
    indices = torch.empty(blocks(x.numel(), chunk), dtype=torch.int32)
    return indices, _run(x, indices, chunk, memory, given=False)


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
    return _run(x, indices.contiguous(), chunk, memory, given=True)


def _run(x: torch.Tensor, indices: torch.Tensor, chunk: int, memory: Memory, given: bool) -> torch.Tensor:
    source = x.detach().to(torch.float32).contiguous().numpy()
    remembers = memory.residual is not None
    residual = source[:0] if memory.residual is None else memory.residual.detach().numpy()
    values = torch.empty(indices.numel(), dtype=torch.float32)
    factors = np.array([memory.alpha, memory.decay, memory.sent], dtype=np.float32)
    _chunks(source, residual, indices.numpy(), values.numpy(), chunk, factors, remembers, given)
    return values


# LLVM vectorises the loops below as long as every value in them stays 32 bits wide; NumPy's promotion rules would widen
# the integers, hence the np.int32 around each of them and plain comparisons for max and min.


@jit
def _largest(bits):
    """Largest magnitude, as an integer."""
    top = np.int32(0)
    for i in range(bits.size):
        magnitude = np.int32(bits[i] & MAGNITUDE)
        top = magnitude if magnitude > top else top
    return top


@jit
def _first(bits, top):
    """Lowest index of the magnitude ``top``; a minimum over all elements is faster than a search that stops."""
    first = np.int32(bits.size)
    for i in range(bits.size):
        index = np.int32(i) if np.int32(bits[i] & MAGNITUDE) == top else np.int32(bits.size)
        first = index if index < first else first
    return first


@jit
def _remember(x, r, decay):
    for i in range(x.size):
        r[i] = decay * r[i] + x[i]


@jit
def _chunks(x, residual, indices, values, chunk, factors, remembers, given):
    alpha, decay, sent = factors
    chunks = indices.size
    group = max(1, GROUP // chunk)
    buffer = np.empty(min(group * chunk, x.size), np.float32)
    for first in range(0, chunks, group):
        last = min(first + group, chunks)
        base = first * chunk
        g = x[base : min(last * chunk, x.size)]
        p = g
        r = residual[base : base + g.size] if remembers else residual
        if remembers:
            p = buffer[: g.size]
            for i in range(g.size):
                p[i] = g[i] + alpha * r[i]
        bits = p.view(np.int32)
        finite = True
        for c in range(first, last):
            start = c * chunk - base
            stop = min(start + chunk, g.size)
            top = _largest(bits[start:stop])
            if top >= INFINITE:
                finite = False
                values[c] = np.nan
                if not given:
                    indices[c] = 0
                continue
            if not given:
                indices[c] = _first(bits[start:stop], top)
            inside = 0 <= indices[c] < stop - start
            values[c] = p[start + indices[c]] if inside else np.float32(0)
        if not remembers:
            continue
        if finite:
            _remember(g, r, decay)
        for c in range(first, last):
            start = c * chunk - base
            stop = min(start + chunk, g.size)
            if np.isnan(values[c]):
                continue
            if not finite:
                _remember(g[start:stop], r[start:stop], decay)
            if 0 <= indices[c] < stop - start:
                r[start + indices[c]] -= sent * values[c]
