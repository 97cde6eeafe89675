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
from ._floats import from_bf16, from_fp16
from ._jit import jit

TILE = 1024  # elements; source, residual and three buffers of a tile fit in 32 KiB

FP32, BF16, FP16 = 0, 1, 2
_EMPTY_FLOAT, _EMPTY_HALF = np.empty(0, np.float32), np.empty(0, np.uint16)
_MAGNITUDE, _INFINITY = np.int32(0x7FFFFFFF), np.int32(0x7F800000)


def source(x: torch.Tensor) -> tuple[np.ndarray, np.ndarray, int]:
    """``(fp32 array, raw 16-bit array, kind)`` for `load`; a non-contiguous x is copied once."""
    x = x.detach().contiguous()
    if x.dtype == torch.float32:
        return x.numpy(), _EMPTY_HALF, FP32
    return _EMPTY_FLOAT, x.view(torch.uint16).numpy(), BF16 if x.dtype == torch.bfloat16 else FP16


NO_SOURCE = _EMPTY_FLOAT, _EMPTY_HALF, FP32


def factors(memory: Memory) -> tuple:
    """``(residual array, whether there is one, alpha, decay, sent)`` for the kernels."""
    r = memory.residual
    array = _EMPTY_FLOAT if r is None else r.detach().numpy()
    return array, r is not None, np.float32(memory.alpha), np.float32(memory.decay), np.float32(memory.sent)


def descent(param: torch.Tensor, momentum_buffer: torch.Tensor | None, lr: float, momentum: float) -> tuple:
    """``(param, momentum array, whether there is one, lr, momentum)`` for the kernels."""
    m = _EMPTY_FLOAT if momentum_buffer is None else momentum_buffer.detach().numpy()
    return param.detach().numpy(), m, momentum_buffer is not None, np.float32(lr), np.float32(momentum)


@jit()
def load(x32, x16, kind, start, count, p):
    """``p[:count] = fp32(x[start : start + count])``."""
    if kind == BF16:
        from_bf16(x16, start, count, p)
    elif kind == FP16:
        from_fp16(x16, start, count, p)
    else:
        start, count = uintp(start), uintp(count)
        for i in range(count):
            p[i] = x32[start + i]


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
def remember(r, kept, q, start, count, sent):
    """``r = kept - sent * q``."""
    start, count = uintp(start), uintp(count)
    for i in range(count):
        r[start + i] = kept[i] - sent * q[i]


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
    """``p /= by``, correctly rounded."""
    if by > 1:
        n = float32(by)
        for i in range(count):
            p[i] = p[i] / n


@jit()
def add(p, q, count):
    for i in range(count):
        p[i] = p[i] + q[i]


@jit()
def descend(update, param, m, has_m, start, count, lr, momentum):
    """``param -= lr * update``, through ``m = momentum * m + update`` with a momentum buffer."""
    start, count = uintp(start), uintp(count)
    if has_m:
        for i in range(count):
            update[i] = momentum * m[start + i] + update[i]
        for i in range(count):
            m[start + i] = update[i]
    for i in range(count):
        param[start + i] = param[start + i] - lr * update[i]
