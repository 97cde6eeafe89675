"""Reference of bit packing; contracts in ops/pack.py."""

from __future__ import annotations

import torch
from torch import Tensor

from ..layout import words


def to_words(codes: Tensor, width: int) -> Tensor:
    """The low ``width`` bits of integer codes [n] -> int32 [ceil(n * width / 32)], the last word padded with zeros."""
    shifts = torch.arange(width, device=codes.device)
    bits = ((codes.long()[:, None] >> shifts) & 1).view(-1)
    count = words(codes.numel(), width)
    bits = torch.nn.functional.pad(bits, (0, 32 * count - bits.numel())).view(count, 32)
    return (bits << torch.arange(32, device=codes.device)).sum(1).to(torch.int32)


def from_words(packed: Tensor, numel: int, width: int) -> Tensor:
    """Inverse of `to_words`: int32 words -> int64 codes [numel], not negative."""
    bits = (packed.long()[:, None] >> torch.arange(32, device=packed.device)) & 1
    codes = bits.view(-1)[: numel * width].view(numel, width)
    return (codes << torch.arange(width, device=packed.device)).sum(1)


def pack_bits(codes: Tensor, width: int, out: Tensor) -> None:
    out.copy_(to_words(codes, width).view(torch.uint8))


def unpack_bits(payload: Tensor, numel: int, width: int, out: Tensor) -> None:
    out.copy_(from_words(payload.view(torch.int32), numel, width))
