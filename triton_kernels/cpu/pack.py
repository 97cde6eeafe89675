"""Numba kernels of bit packing; contracts in reference/pack.py."""

from __future__ import annotations

import numpy as np
import torch
from numba import int32, uint32, uint64

from ..layout import check_codes, check_payload, check_width, words
from ._jit import jit

_WORD = np.uint64(32)


@jit()
def _pack(codes, width, out):
    mask = uint64((1 << width) - 1)
    pending, filled, w = uint64(0), 0, 0
    for i in range(codes.size):
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
def _unpack(packed, width, out):
    mask = uint64((1 << width) - 1)
    pending, filled, w = uint64(0), 0, 0
    for i in range(out.size):
        if filled < width:
            pending |= uint64(packed[w]) << uint64(filled)
            filled += 32
            w += 1
        out[i] = int32(pending & mask)
        pending >>= uint64(width)
        filled -= width


def pack_bits(codes, width):
    check_width(width)
    check_codes(codes)
    out = torch.empty(words(codes.numel(), width), dtype=torch.uint32)
    _pack(codes.contiguous().numpy(), width, out.numpy())
    return out.view(torch.uint8)


def unpack_bits(payload, numel, width):
    check_width(width)
    check_payload(payload, 4 * words(numel, width))
    out = torch.empty(numel, dtype=torch.int32)
    _unpack(payload.view(torch.uint32).numpy(), width, out.numpy())
    return out
