"""Chunk-wise arg-max with error-feedback memory, in plain PyTorch (K4).

The vector is cut into chunks of ``chunk`` elements, the last one possibly short, and one element of each is sent: on
the leader the largest in magnitude (``chunk_select``), elsewhere the one that the leader names (``chunk_gather``).
Local indices cost ceil(log2 chunk) bits, need no sort, and make the whole step one pass over memory.

Chen et al., "ScaleCom: Scalable sparsified gradient compression for communication-efficient distributed training",
NeurIPS 2020.
"""

from __future__ import annotations

import torch

from ..checks import check_chunk, check_indices
from ..layout import Memory, blocks, check_input
from ._memory import blocked, compensate, per_element, remember


def chunk_select(
    x: torch.Tensor,
    chunk: int,
    residual: torch.Tensor | None = None,
    alpha: float = 1.0,
    decay: float = 1.0,
    sent: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Largest ``|p|`` of every chunk, ``p = x + alpha * r``; ties go to the lowest index.

    ``r <- decay * r + x - sent * q`` in the same pass, where ``q`` is p at the chosen elements and 0 elsewhere. A chunk
    with a NaN or Inf in p has index 0 and value NaN, and its residual is left untouched.

    Args:
        x: fp32, fp16 or bf16 [n], of any stride.
        chunk: elements a chunk, at least 1.
        residual: fp32 [n] or None, updated in place.

    Returns:
        (indices int32 [ceil(n / chunk)], offsets inside the chunk; values fp32 of the same shape).
    """
    memory = Memory(residual, alpha, decay, sent)
    check_input(x, memory)
    check_chunk(chunk)
    p = compensate(x, memory)
    magnitudes = blocked(p.abs(), chunk)  # zeros beyond the end never win: ties go to the lowest index
    top = magnitudes.amax(dim=1, keepdim=True)
    offsets = torch.arange(chunk, dtype=torch.int32, device=x.device)
    first = torch.where(magnitudes == top, offsets, chunk).amin(dim=1)
    indices = torch.where(top.isfinite().squeeze(1), first, 0).to(torch.int32)
    return indices, _send(x, p, indices, chunk, memory)


def chunk_gather(
    x: torch.Tensor,
    indices: torch.Tensor,
    chunk: int,
    residual: torch.Tensor | None = None,
    alpha: float = 1.0,
    decay: float = 1.0,
    sent: float = 1.0,
) -> torch.Tensor:
    """``p = x + alpha * r`` at given offsets, one a chunk; the memory is updated as by ``chunk_select``.

    A chunk with a NaN or Inf in p has value NaN and keeps its residual. An index outside its chunk (it can only be one
    beyond a short last chunk) names nothing: its value is 0 and the whole chunk goes to the residual.

    Args:
        indices: int32 [ceil(n / chunk)], offsets inside the chunk.
        x, chunk, residual: as in ``chunk_select``.

    Returns:
        fp32 [ceil(n / chunk)].
    """
    memory = Memory(residual, alpha, decay, sent)
    check_input(x, memory)
    check_chunk(chunk)
    check_indices(indices, blocks(x.numel(), chunk), x)
    return _send(x, compensate(x, memory), indices, chunk, memory)


def _send(x: torch.Tensor, p: torch.Tensor, indices: torch.Tensor, chunk: int, memory: Memory) -> torch.Tensor:
    """Values of p at the indices; the residual loses what is sent."""
    numel, rows = x.numel(), blocked(p, chunk)
    finite = rows.isfinite().all(dim=1)
    offsets = torch.arange(chunk, dtype=torch.int32, device=x.device)
    q = torch.where(offsets == indices[:, None], rows, 0.0).view(-1)[:numel]
    remember(x, q, ~per_element(finite, numel, chunk), memory)
    inside = (indices >= 0) & (indices < chunk)
    values = rows.gather(1, torch.where(inside, indices, 0).long()[:, None]).squeeze(1)
    return torch.where(finite, torch.where(inside, values, 0.0), torch.nan)
