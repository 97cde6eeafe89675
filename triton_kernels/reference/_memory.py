"""Error feedback around an encoder, and the cutting of vectors into blocks."""

from __future__ import annotations

import torch

from ..layout import Memory, blocks


def compensate(x: torch.Tensor, memory: Memory | None) -> torch.Tensor:
    """``p = x + alpha * r`` in fp32, a new tensor."""
    p = x.to(torch.float32, copy=True)
    return p if memory is None else p + memory.alpha * memory.residual


def remember(x: torch.Tensor, q: torch.Tensor, keep: torch.Tensor, memory: Memory | None) -> None:
    """The new memory ``decay * r + x - sent * q``, or r where ``keep`` (bool, per element) holds."""
    if memory is not None:
        r = memory.residual
        memory.updated.copy_(torch.where(keep, r, memory.decay * r + x.to(torch.float32) - memory.sent * q))


def blocked(x: torch.Tensor, block: int) -> torch.Tensor:
    """``x`` padded with zeros to whole blocks -> [blocks, block]."""
    count = blocks(x.numel(), block)
    return torch.nn.functional.pad(x, (0, count * block - x.numel())).view(count, block)


def per_element(values: torch.Tensor, numel: int, block: int) -> torch.Tensor:
    """One value per block -> one value per element."""
    return values.repeat_interleave(block)[:numel]


def divide(a: torch.Tensor, b: float) -> torch.Tensor:
    """Correctly rounded ``a / b``; torch may multiply by the reciprocal of a Python scalar."""
    return a / torch.full_like(a, b)


def store(values: torch.Tensor, out: torch.Tensor, weight: float, accumulate: bool) -> None:
    """``out = weight * values`` or ``out += weight * values``."""
    weighted = weight * values
    out.copy_(out + weighted if accumulate else weighted)


def mean_in_rank_order(decoded: list[torch.Tensor]) -> torch.Tensor:
    """Average of one vector per rank; the sum runs from rank 0 upwards."""
    total = decoded[0].clone()
    for values in decoded[1:]:
        total += values
    return divide(total, len(decoded))
