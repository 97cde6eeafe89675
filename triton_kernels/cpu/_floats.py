"""Conversions between fp32 and the short formats, by integer arithmetic that LLVM vectorises anywhere.

All round to nearest even and agree with PyTorch's conversions, except that NaN has one canonical pattern. Every
intermediate is cast to int32, because Numba widens 32-bit results to 64 bits, which halves the width of the vectors.
"""

from __future__ import annotations

import numpy as np
from numba import float32, int32, uint8, uint16, uintp

from ._bits import as_bits, as_float
from ._jit import jit

_I = np.int32
_MAGNITUDE, _INFINITY, _NAN = _I(0x7FFFFFFF), _I(0x7F800000), _I(0x7FC00000)
_BF16_NAN, _FP16_NAN, _FP16_INFINITY = _I(0x7FC0), _I(0x7E00), _I(0x7C00)
_FP16_REBIAS = np.float32(2.0**112)  # moves an fp16 exponent field to its place in fp32, subnormals included
_FP16_OVERFLOW, _FP16_NORMAL = _I((127 + 16) << 23), _I((127 - 14) << 23)
_HALF, _HALF_BITS = np.float32(0.5), _I(126 << 23)  # adding 0.5 rounds to multiples of 2**-24, the fp16 subnormals
_FP8_NORMAL, _FP8_SUBNORMAL = _I((127 - 6) << 23), np.float32(2.0**-9)
_2_14, _2_14_BITS = np.float32(2.0**14), _I((127 + 14) << 23)  # likewise 2**14 for multiples of 2**-9, of e4m3


@jit()
def from_bf16(codes, first, count, p):
    bits, first = p.view(np.int32), uintp(first)
    for i in range(uintp(count)):
        bits[i] = int32(int32(codes[first + i]) << _I(16))


@jit()
def to_bf16(p, count, codes, first):
    bits, first = p.view(np.int32), uintp(first)
    for i in range(uintp(count)):
        u = bits[i]
        odd = int32(int32(u >> _I(16)) & _I(1))
        rounded = int32(int32(int32(u + odd) + _I(0x7FFF)) >> _I(16))
        nan = int32(u & _MAGNITUDE) > _INFINITY
        codes[first + i] = uint16(_BF16_NAN if nan else rounded)


@jit()
def from_fp16(codes, first, count, p):
    bits, first = p.view(np.int32), uintp(first)
    for i in range(uintp(count)):
        bits[i] = int32(int32(int32(codes[first + i]) & _I(0x7FFF)) << _I(13))
    for i in range(uintp(count)):
        p[i] = p[i] * _FP16_REBIAS
    for i in range(uintp(count)):
        half = int32(codes[first + i])
        special = _INFINITY if int32(half & _FP16_INFINITY) == _FP16_INFINITY else _I(0)
        bits[i] = int32(bits[i] | special) | int32(int32(half & _I(0x8000)) << _I(16))


@jit()
def to_fp16(p, count, codes, first, scratch):
    """``scratch``: fp32, as long as p."""
    bits, small, first = p.view(np.int32), scratch.view(np.int32), uintp(first)
    for i in range(uintp(count)):
        scratch[i] = abs(p[i]) + _HALF
    for i in range(uintp(count)):
        u = int32(bits[i] & _MAGNITUDE)
        odd = int32(int32(u >> _I(13)) & _I(1))
        normal = int32(int32(int32(u + odd) + _I(0xFFF - (112 << 23))) >> _I(13))
        code = normal if u >= _FP16_NORMAL else int32(small[i] - _HALF_BITS)
        code = _FP16_INFINITY if u >= _FP16_OVERFLOW else code
        small[i] = _FP16_NAN if u > _INFINITY else code
    for i in range(uintp(count)):
        sign = int32(int32(bits[i] >> _I(16)) & _I(0x8000))
        codes[first + i] = uint16(small[i] | (_I(0) if small[i] == _FP16_NAN else sign))


@jit()
def from_fp8(codes, first, count, p, scale):
    """``p = e4m3(codes) * scale``."""
    first = uintp(first)
    for i in range(uintp(count)):
        code = int32(codes[first + i])
        magnitude = int32(code & _I(0x7F))
        number = int32(int32(magnitude << _I(20)) + _I(120 << 23))
        normal = as_float(_NAN if magnitude == _I(0x7F) else number)
        value = normal if magnitude >= _I(8) else float32(magnitude) * _FP8_SUBNORMAL
        p[i] = as_float(int32(as_bits(value) | int32(int32(code & _I(0x80)) << _I(24)))) * scale


@jit()
def to_fp8(p, count, codes, first, inverse):
    """``codes = e4m3(p * inverse)`` for products of at most 448 * (1 + 2**-22)."""
    first = uintp(first)
    for i in range(uintp(count)):
        y = p[i] * inverse
        u = int32(as_bits(y) & _MAGNITUDE)
        odd = int32(int32(u >> _I(20)) & _I(1))
        normal = int32(int32(int32(u + odd) + _I(0x7FFFF - (120 << 23))) >> _I(20))
        small = int32(as_bits(abs(y) + _2_14) - _2_14_BITS)
        code = normal if u >= _FP8_NORMAL else small
        codes[first + i] = uint8(int32(code | int32(int32(as_bits(y) >> _I(24)) & _I(0x80))))
