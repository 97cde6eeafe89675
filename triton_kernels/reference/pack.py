"""Reference of bit packing: codes of 1 to 16 bits, LSB first, in little-endian 32-bit words."""

from __future__ import annotations

import torch

from ..layout import check_codes, check_payload, check_width, words


def to_words(codes: torch.Tensor, width: int) -> torch.Tensor:
    """The low ``width`` bits of integer codes [n] -> int32 [ceil(n * width / 32)], the last word padded with zeros."""
    shifts = torch.arange(width, device=codes.device)
    bits = ((codes.long()[:, None] >> shifts) & 1).view(-1)
    count = words(codes.numel(), width)
    bits = torch.nn.functional.pad(bits, (0, 32 * count - bits.numel())).view(count, 32)
    return (bits << torch.arange(32, device=codes.device)).sum(1).to(torch.int32)


def from_words(packed: torch.Tensor, numel: int, width: int) -> torch.Tensor:
    """Inverse of `to_words`: int32 words -> int64 codes [numel], not negative."""
    bits = (packed.long()[:, None] >> torch.arange(32, device=packed.device)) & 1
    codes = bits.view(-1)[: numel * width].view(numel, width)
    return (codes << torch.arange(width, device=packed.device)).sum(1)


def pack_bits(codes: torch.Tensor, width: int) -> torch.Tensor:
    """Packs the low ``width`` bits of each code.

    Args:
        codes: int32 [n], values in [0, 2**width); higher bits are dropped.
        width: 1 to 16.

    Returns:
        uint8 [4 * ceil(n * width / 32)]; code i stands at bits ``[i * width, (i + 1) * width)``, LSB first.
    """
    check_width(width)
    check_codes(codes)
    return to_words(codes, width).view(torch.uint8)


def unpack_bits(payload: torch.Tensor, numel: int, width: int) -> torch.Tensor:
    """Inverse of `pack_bits` -> int32 [numel]. ``payload``: uint8 [4 * ceil(numel * width / 32)]."""
    check_width(width)
    check_payload(payload, 4 * words(numel, width))
    return from_words(payload.view(torch.int32), numel, width).to(torch.int32)
