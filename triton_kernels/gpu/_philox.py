"""Triton twin of `philox.philox4x32`, in the element order of the project: one counter serves eight elements."""

from __future__ import annotations

import triton
import triton.language as tl

from ..philox import MULTIPLIER_0, MULTIPLIER_1, ROUNDS, WEYL_0, WEYL_1, Key

_M0, _M1 = tl.constexpr(MULTIPLIER_0), tl.constexpr(MULTIPLIER_1)
_W0, _W1 = tl.constexpr(WEYL_0), tl.constexpr(WEYL_1)
_ROUNDS = tl.constexpr(ROUNDS)

# Kernel arguments that change from call to call and must not start a new compilation.
KEY_ARGUMENTS = ["seed", "tensor", "first", "step", "rank", "stream"]


def words_of(key: Key | None) -> tuple[int, ...]:
    """The six words as signed 32-bit integers, so that every key has the argument type int32; zeros for no key."""
    words = key.words() if key is not None else (0,) * 6
    return tuple(word - (word >> 31 << 32) for word in words)


@triton.jit
def _product(c, MULTIPLIER: tl.constexpr):
    """High and low word of a product, which one instruction makes."""
    wide = c.to(tl.uint64) * MULTIPLIER
    return (wide >> 32).to(tl.uint32), wide.to(tl.uint32)


@triton.jit
def philox4x32(c0, c1, c2, c3, k0, k1):
    """Philox4x32-10 on uint32 tensors of one shape; the key words are uint32 scalars."""
    for _ in tl.static_range(_ROUNDS):
        high_0, low_0 = _product(c0, _M0)
        high_1, low_1 = _product(c2, _M1)
        c0, c1, c2, c3 = high_1 ^ c1 ^ k0, low_1, high_0 ^ c3 ^ k1, low_0
        k0, k1 = k0 + _W0, k1 + _W1
    return c0, c1, c2, c3


@triton.jit
def words32(counter, seed, tensor, first, step, rank, stream):
    """The four words (uint32) of every counter, in order: [rows, m] -> [rows, m, 4]; arguments of `uniform16`."""
    zero = (counter * 0).to(tl.uint32)
    c0 = counter.to(tl.uint32) + first.to(tl.uint32)
    c1, c2, c3 = zero + step.to(tl.uint32), zero + rank.to(tl.uint32), zero + stream.to(tl.uint32)
    w0, w1, w2, w3 = philox4x32(c0, c1, c2, c3, seed.to(tl.uint32), tensor.to(tl.uint32))
    return tl.join(tl.join(w0, w2), tl.join(w1, w3)).reshape(counter.shape[0], counter.shape[1], 4)


@triton.jit
def uniform16(counter, seed, tensor, first, step, rank, stream):
    """Random halves ``h`` (int32) of the eight elements of every counter: [rows, m] -> [rows, m, 8].

    ``counter``: element index // 8, of which the low 32 bits count; the other arguments are `words_of` the key.
    """
    words = words32(counter, seed, tensor, first, step, rank, stream)
    halves = tl.join(words & 0xFFFF, words >> 16)
    return halves.reshape(counter.shape[0], counter.shape[1], 8).to(tl.int32)


@triton.jit
def variate(h):
    """``(h + 1/2) / 65536`` in fp32, exact: the bits of 1 + u, less one."""
    return ((h << 7) | 0x3F800040).to(tl.float32, bitcast=True) - 1.0
