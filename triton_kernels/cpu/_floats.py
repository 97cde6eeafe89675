"""Conversions between fp32 and the short formats, by integer arithmetic that LLVM vectorises anywhere.

All round to nearest even and agree with PyTorch's conversions, except that NaN has one canonical pattern.
"""

from __future__ import annotations

import numpy as np
from numba import float32, uint8, uint16, uint32, uintp

from ._jit import jit

_U = np.uint32
_SIGN, _MAGNITUDE, _INFINITY = _U(0x80000000), _U(0x7FFFFFFF), _U(0x7F800000)
_BF16_NAN, _FP16_NAN = _U(0x7FC0), _U(0x7E00)
_FP16_REBIAS = np.float32(2.0**112)  # moves an fp16 exponent field to its place in fp32, subnormals included
_FP16_OVERFLOW, _FP16_NORMAL = _U((127 + 16) << 23), _U((127 - 14) << 23)
_HALF, _HALF_BITS = np.float32(0.5), _U(126 << 23)  # adding 0.5 rounds to multiples of 2**-24, the fp16 subnormals
_FP8_NORMAL, _FP8_SUBNORMAL = _U((127 - 6) << 23), np.float32(2.0**-9)
_2_14, _2_14_BITS = np.float32(2.0**14), _U((127 + 14) << 23)  # likewise 2**14 for multiples of 2**-9


@jit()
def from_bf16(codes, first, count, p):
    bits, first = p.view(np.uint32), uintp(first)
    for i in range(uintp(count)):
        bits[i] = uint32(codes[first + i]) << _U(16)


@jit()
def to_bf16(p, count, codes, first):
    bits, first = p.view(np.uint32), uintp(first)
    for i in range(uintp(count)):
        u = bits[i]
        rounded = uint32(u + _U(0x7FFF) + ((u >> _U(16)) & _U(1))) >> _U(16)
        nan = (u & _MAGNITUDE) > _INFINITY
        codes[first + i] = uint16(_BF16_NAN if nan else rounded)


@jit()
def from_fp16(codes, first, count, p):
    bits, first = p.view(np.uint32), uintp(first)
    for i in range(uintp(count)):
        bits[i] = (uint32(codes[first + i]) & _U(0x7FFF)) << _U(13)
    for i in range(uintp(count)):
        p[i] = p[i] * _FP16_REBIAS
    for i in range(uintp(count)):
        half = uint32(codes[first + i])
        special = _INFINITY if (half & _U(0x7C00)) == _U(0x7C00) else _U(0)
        bits[i] = bits[i] | special | ((half & _U(0x8000)) << _U(16))


@jit()
def to_fp16(p, count, codes, first, scratch):
    """``scratch``: fp32, as long as p."""
    bits, first = p.view(np.uint32), uintp(first)
    small = scratch.view(np.uint32)
    for i in range(uintp(count)):
        scratch[i] = abs(p[i]) + _HALF
    for i in range(uintp(count)):
        u = bits[i] & _MAGNITUDE
        rounded = uint32(u + _U(0xFFF) + ((u >> _U(13)) & _U(1)) - _U(112 << 23)) >> _U(13)
        rounded = rounded if u >= _FP16_NORMAL else uint32(small[i] - _HALF_BITS)
        rounded = _U(0x7C00) if u >= _FP16_OVERFLOW else rounded
        sign = (bits[i] & _SIGN) >> _U(16)
        codes[first + i] = uint16(_FP16_NAN if u > _INFINITY else rounded | sign)


@jit()
def from_fp8(codes, first, count, p, scale):
    """``p = e4m3(codes) * scale``; no NaN codes."""
    bits, first = p.view(np.uint32), uintp(first)
    for i in range(uintp(count)):
        code = uint32(codes[first + i]) & _U(0x7F)
        bits[i] = uint32((code << _U(20)) + _U(120 << 23))
    for i in range(uintp(count)):
        code = uint32(codes[first + i]) & _U(0x7F)
        p[i] = p[i] if code >= _U(8) else float32(code) * _FP8_SUBNORMAL
    for i in range(uintp(count)):
        bits[i] = bits[i] | ((uint32(codes[first + i]) & _U(0x80)) << _U(24))
    for i in range(uintp(count)):
        p[i] = p[i] * scale


@jit()
def to_fp8(p, count, codes, first, inverse, scratch):
    """``codes = e4m3(p * inverse)`` for products of at most 448 * (1 + 2**-22); changes p. ``scratch``: fp32."""
    bits, first = p.view(np.uint32), uintp(first)
    small = scratch.view(np.uint32)
    for i in range(uintp(count)):
        p[i] = p[i] * inverse
        scratch[i] = abs(p[i]) + _2_14
    for i in range(uintp(count)):
        u = bits[i] & _MAGNITUDE
        rounded = uint32(u + _U(0x7FFFF) + ((u >> _U(20)) & _U(1)) - _U(120 << 23)) >> _U(20)
        rounded = rounded if u >= _FP8_NORMAL else uint32(small[i] - _2_14_BITS)
        codes[first + i] = uint8(rounded | ((bits[i] & _SIGN) >> _U(24)))
