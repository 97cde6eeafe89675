"""Bit packing: codes of 1 to 16 bits, LSB first, in little-endian 32-bit words."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import dispatch, layout
from . import _checks as check

_bodies = dispatch.Bodies(__name__)


def pack_bits(codes: Tensor, width: int) -> Tensor:
    """Packs the low ``width`` bits of each code.

    Args:
        codes: int32 [n], any stride, values in [0, 2**width); higher bits are dropped.
        width: 1 to 16 bits.

    Returns:
        uint8 [4 * ceil(n * width / 32)]; code i stands at bits ``[i * width, (i + 1) * width)``, LSB first.

    Raises:
        CompressionError: the codes are not 1-D int32, or ``width`` is out of range.
    """
    check.width_of(width)
    numel = check.codes(codes)
    out = check.payload_out(None, 4 * layout.words(numel, width), codes)
    _bodies(codes).pack_bits(codes, width, out)
    return out


def unpack_bits(payload: Tensor, numel: int, width: int) -> Tensor:
    """Inverse of `pack_bits`.

    Args:
        payload: uint8 [4 * ceil(numel * width / 32)].
        numel: number of codes.
        width: 1 to 16 bits.

    Returns:
        int32 [numel].

    Raises:
        CompressionError: the payload has another size, or ``width`` is out of range.
    """
    check.width_of(width)
    check.numel_of(numel)
    check.payload(payload, 4 * layout.words(numel, width))
    out = torch.empty(numel, dtype=torch.int32, device=payload.device)
    _bodies(payload).unpack_bits(payload, numel, width, out)
    return out
