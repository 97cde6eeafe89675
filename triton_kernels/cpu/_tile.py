"""What the CPU encoders share: a tile of elements that stays in the first-level cache, its memory and its statistics.

An encoder walks over blocks, and inside a block over tiles of at most ``TILE`` elements: load and compensate a tile,
measure the block, then quantize tile by tile. Each step is its own loop, short enough for LLVM to vectorise: that needs
unsigned indices (`uintp`), since Numba otherwise tests every ``start + i`` for a negative, wrapping index.
"""

from __future__ import annotations

import numpy as np
import torch
from numba import float32, int32, uintp

from ..layout import Memory
from ._arrays import floats, unsigned16
from ._floats import from_bf16, from_fp16
from ._jit import jit

TILE = 1024  # elements; source, residual and three buffers of a tile fit in 32 KiB

FP32, BF16, FP16 = 0, 1, 2
_KINDS = {torch.float32: FP32, torch.bfloat16: BF16, torch.float16: FP16}
_MAGNITUDE, _INFINITY = np.int32(0x7FFFFFFF), np.int32(0x7F800000)
NO_SOURCE = 0, FP32
NO_MEMORY = 0, 0, 0.0, 0.0, 0.0


def source(x: torch.Tensor) -> tuple[int, int]:
    """``(address, kind)`` of a contiguous x, for `load`."""
    return x.data_ptr(), _KINDS[x.dtype]


def factors(memory: Memory | None) -> tuple[int, int, float, float, float]:
    """Addresses of the memory and of what it becomes, and ``alpha, decay, sent``, for `memory_of`."""
    if memory is None:
        return NO_MEMORY
    r, updated, alpha, decay, sent = memory
    return r.data_ptr(), updated.data_ptr(), float(alpha), float(decay), float(sent)


@jit()
def memory_of(numel, r, updated, alpha, decay, sent):
    """Arrays and fp32 factors of the five arguments that `factors` makes."""
    return floats(r, numel), floats(updated, numel), float32(alpha), float32(decay), float32(sent)


@jit()
def as_it_is(x, kind, numel, ranks, has_r):
    """x itself where nothing is to be computed before a tile of it is used, else an array of no elements."""
    return floats(x, numel if kind == FP32 and not ranks and not has_r else 0)


@jit()
def load(x, kind, start, count, p):
    """``p[:count] = fp32(x[start : start + count])``, x at an address."""
    if kind == BF16:
        from_bf16(unsigned16(x, start + count), start, count, p)
    elif kind == FP16:
        from_fp16(unsigned16(x, start + count), start, count, p)
    else:
        values = floats(x, start + count)
        start, count = uintp(start), uintp(count)
        for i in range(count):
            p[i] = values[start + i]


@jit()
def copy(r, updated, start, count):
    """``updated = r``: the memory of what is not finite, where it goes elsewhere."""
    start, count = uintp(start), uintp(count)
    for i in range(count):
        updated[start + i] = r[start + i]


@jit()
def compensate(p, kept, r, start, count, alpha, decay):
    """From x in ``p``: ``kept = decay * r + x`` and ``p = x + alpha * r``; one buffer for both if decay = alpha."""
    start, count = uintp(start), uintp(count)
    if alpha == decay:
        for i in range(count):
            p[i] = p[i] + alpha * r[start + i]
    else:
        for i in range(count):
            kept[i] = decay * r[start + i] + p[i]
        for i in range(count):
            p[i] = p[i] + alpha * r[start + i]


@jit()
def remember(updated, kept, q, start, count, sent):
    """``updated = kept - sent * q``."""
    start, count = uintp(start), uintp(count)
    for i in range(count):
        updated[start + i] = kept[i] - sent * q[i]


@jit()
def store(values, out, start, count, weight, accumulate):
    """``out = weight * values`` or ``out += weight * values``."""
    start, count = uintp(start), uintp(count)
    if accumulate:
        for i in range(count):
            out[start + i] = out[start + i] + weight * values[i]
    else:
        for i in range(count):
            out[start + i] = weight * values[i]


# Only these sums may be reordered by the compiler; fp64 keeps their result within one fp32 ulp of any other order.
@jit(fastmath={"reassoc", "nsz"})
def sum_abs(p, count):
    total = 0.0
    for i in range(count):
        total += np.float64(abs(p[i]))
    return total


@jit(fastmath={"reassoc", "nsz"})
def sums(p, count):
    """``(sum |p|, sum p**2)``"""
    magnitudes, squares = 0.0, 0.0
    for i in range(uintp(count)):
        wide = np.float64(p[i])
        magnitudes += abs(wide)
        squares += wide * wide
    return magnitudes, squares


@jit(fastmath={"reassoc", "nsz"})
def sum_squares(p, count):
    total = 0.0
    for i in range(count):
        total += np.float64(p[i]) * np.float64(p[i])
    return total


@jit()
def max_magnitude_bits(p, count):
    """Bit pattern of max |p|: ordered like the magnitudes, with Inf and NaN above every finite number."""
    bits = p.view(np.int32)
    largest = int32(0)
    for i in range(count):
        largest = max(largest, int32(bits[i] & _MAGNITUDE))
    return largest


@jit()
def finite_bits(bits):
    return bits < _INFINITY


@jit()
def float_of(bits):
    return np.int32(bits).view(np.float32)


@jit()
def divide(p, count, by):
    """``p /= by``, correctly rounded: the reciprocal of a power of two is exact."""
    n, inverse = float32(by), float32(1) / float32(by)
    if by & (by - 1) == 0:
        if by > 1:
            for i in range(uintp(count)):
                p[i] = p[i] * inverse
    else:
        for i in range(uintp(count)):
            p[i] = p[i] / n


@jit()
def add(p, q, count):
    for i in range(count):
        p[i] = p[i] + q[i]
