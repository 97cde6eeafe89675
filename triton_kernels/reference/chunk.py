"""Reference of the chunk-wise arg-max; contracts in ops/chunk.py."""

from __future__ import annotations

import torch
from torch import Tensor

from ..layout import Memory
from ._memory import blocked, compensate, per_element, remember


def chunk_select(x: Tensor, chunk: int, memory: Memory | None, indices: Tensor, values: Tensor) -> None:
    p = compensate(x, memory)
    magnitudes = blocked(p.abs(), chunk)  # zeros beyond the end never win: ties go to the lowest index
    top = magnitudes.amax(dim=1, keepdim=True)
    offsets = torch.arange(chunk, dtype=torch.int32, device=x.device)
    first = torch.where(magnitudes == top, offsets, chunk).amin(dim=1)
    indices.copy_(torch.where(top.isfinite().squeeze(1), first, 0))
    _send(x, p, indices, chunk, memory, values)


def chunk_gather(x: Tensor, indices: Tensor, chunk: int, memory: Memory | None, values: Tensor) -> None:
    _send(x, compensate(x, memory), indices, chunk, memory, values)


def _send(x: Tensor, p: Tensor, indices: Tensor, chunk: int, memory: Memory | None, values: Tensor) -> None:
    """Values of p at the indices; the memory loses what is sent."""
    numel, rows = x.numel(), blocked(p, chunk)
    finite = rows.isfinite().all(dim=1)
    offsets = torch.arange(chunk, dtype=torch.int32, device=x.device)
    q = torch.where(offsets == indices[:, None], rows, 0.0).view(-1)[:numel]
    remember(x, q, ~per_element(finite, numel, chunk), memory)
    inside = (indices >= 0) & (indices < chunk)
    chosen = rows.gather(1, torch.where(inside, indices, 0).long()[:, None]).squeeze(1)
    values.copy_(torch.where(finite, torch.where(inside, chosen, 0.0), torch.nan))
