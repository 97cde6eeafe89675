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
def philox4x32(c0, c1, c2, c3, k0, k1):
    """Philox4x32-10 on uint32 tensors of one shape; the key words are uint32 scalars."""
    for _ in tl.static_range(_ROUNDS):
        high_0, high_1 = tl.umulhi(c0, _M0), tl.umulhi(c2, _M1)
        low_0, low_1 = c0 * _M0, c2 * _M1
        c0, c1, c2, c3 = high_1 ^ c1 ^ k0, low_1, high_0 ^ c3 ^ k1, low_0
        k0, k1 = k0 + _W0, k1 + _W1
    return c0, c1, c2, c3


@triton.jit
def words32(counter, seed, tensor, first, step, rank, stream):
    """The four words (uint32) of every counter, in order: [rows, m] int64 -> [rows, 4 m]; arguments of `uniform16`."""
    zero = (counter * 0).to(tl.uint32)
    c0 = counter.to(tl.uint32) + first.to(tl.uint32)
    c1, c2, c3 = zero + step.to(tl.uint32), zero + rank.to(tl.uint32), zero + stream.to(tl.uint32)
    w0, w1, w2, w3 = philox4x32(c0, c1, c2, c3, seed.to(tl.uint32), tensor.to(tl.uint32))
    return tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3))


@triton.jit
def uniform16(counter, seed, tensor, first, step, rank, stream):
    """Random halves ``h`` (int32) of the eight elements of every counter: [rows, m] int64 -> [rows, 8 m].

    ``counter``: element index // 8; the other arguments are `words_of` the key.
    """
    words = words32(counter, seed, tensor, first, step, rank, stream)
    return tl.interleave(words & 0xFFFF, words >> 16).to(tl.int32)
