"""Reference of the mergeable one-bit payloads; contracts in ops/fold.py."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..layout import Memory
from ..philox import Key, uniform16
from .pack import from_words, to_words


def bit_merge(left: Tensor, right: Tensor, below: int, key: Key, merged: Tensor) -> None:
    """Draws below ``below`` keep the left bit."""
    keep = to_words(uniform16(key, 8 * left.numel(), left.device) < below, 1).view(torch.uint8)
    merged.copy_(right ^ ((left ^ right) & keep))


def one_hot_signs(x: Tensor, rank: int, size: int, key: Key, memory: Memory | None, bits: Tensor) -> None:
    mine = (uniform16(key, x.numel(), x.device).long() * size) >> 16 == rank
    bits.copy_(to_words((_compensated(x, memory) >= 0) & mine, 1).view(torch.uint8))


def sign_bits(x: Tensor, memory: Memory | None, bits: Tensor) -> None:
    bits.copy_(to_words(_compensated(x, memory) >= 0, 1).view(torch.uint8))


def signs_expand(bits: Tensor, numel: int, eta: float, memory: Memory | None, result: Tensor) -> None:
    signs = 2 * from_words(bits.view(torch.int32), numel, 1) - 1
    torch.mul(signs.to(torch.float32), eta, out=result)
    if memory is not None:
        torch.sub(memory.residual, result, out=memory.updated)


def signs_expand_each(bits: Tensor, etas: Tensor, sizes: Sequence[int], memory: Memory | None, result: Tensor) -> None:
    signs_expand(bits, len(result), 1.0, None, result)
    result.mul_(etas.repeat_interleave(torch.tensor(sizes, device=etas.device), output_size=len(result)))
    if memory is not None:
        torch.sub(memory.residual, result, out=memory.updated)


def _compensated(x: Tensor, memory: Memory | None) -> Tensor:
    """p, which is also the new memory."""
    p = x.to(torch.float32)
    return p if memory is None else torch.add(memory.residual, p, out=memory.updated)
