"""Numba kernels of bit packing; contracts in ops/pack.py."""

from __future__ import annotations

import numpy as np
from numba import int32, uint32, uint64

from ._arrays import signed32, unsigned32
from ._jit import jit

_WORD = np.uint64(32)


@jit()
def _pack(codes_at, numel, width, out_at):
    codes, out = signed32(codes_at, numel), unsigned32(out_at, (numel * width + 31) // 32)
    mask = uint64((1 << width) - 1)
    pending, filled, w = uint64(0), 0, 0
    for i in range(numel):
        pending |= (uint64(codes[i]) & mask) << uint64(filled)
        filled += width
        if filled >= 32:
            out[w] = uint32(pending)
            pending >>= _WORD
            filled -= 32
            w += 1
    if filled:
        out[w] = uint32(pending)


@jit()
def _unpack(packed_at, numel, width, out_at):
    packed, out = unsigned32(packed_at, (numel * width + 31) // 32), signed32(out_at, numel)
    mask = uint64((1 << width) - 1)
    pending, filled, w = uint64(0), 0, 0
    for i in range(numel):
        if filled < width:
            pending |= uint64(packed[w]) << uint64(filled)
            filled += 32
            w += 1
        out[i] = int32(pending & mask)
        pending >>= uint64(width)
        filled -= width


def pack_bits(codes, width, out):
    codes = codes.contiguous()
    _pack(codes.data_ptr(), codes.numel(), width, out.data_ptr())


def unpack_bits(payload, numel, width, out):
    _unpack(payload.data_ptr(), numel, width, out.data_ptr())
