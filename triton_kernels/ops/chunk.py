"""Chunk-wise arg-max with error-feedback memory.

The vector is cut into chunks of ``chunk`` elements, the last one possibly short, and one element of each is sent: on
the leader the largest in magnitude (``chunk_select``), elsewhere the one that the leader names (``chunk_gather``).
Local indices cost ceil(log2 chunk) bits, need no sort, and make the whole step one pass over memory.

Chen, Ni, Lu, Cui, Chen, Sun, Wang, Venkataramani, Srinivasan, Zhang, Gopalakrishnan, "ScaleCom: scalable sparsified
gradient compression for communication-efficient distributed training", NeurIPS 2020, arXiv 2104.11125.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import dispatch, layout
from . import _checks as check

_bodies = dispatch.Bodies(__name__)


def chunk_select(
    x: Tensor,
    chunk: int,
    residual: Tensor | None = None,
    alpha: float = 1.0,
    decay: float = 1.0,
    sent: float = 1.0,
    *,
    updated: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Largest ``|p|`` of every chunk, ``p = x + alpha * residual``; ties go to the lowest index.

    The new memory is ``decay * residual + x - sent * q`` in the same pass, where ``q`` is p at the chosen elements and
    0 elsewhere. A chunk with a NaN or Inf in p has index 0 and value NaN, and keeps its memory.

    Args:
        x: fp32, fp16 or bf16 [n], any stride.
        chunk: elements per chunk, at least 1.
        residual: memory, fp32 [n], or None.
        alpha, decay, sent: factors of the memory.
        updated: where the new memory goes, fp32 [n]; None means to ``residual``.

    Returns:
        (indices int32 [ceil(n / chunk)], offsets inside the chunk; values fp32 of the same shape).

    Raises:
        CompressionError: a shape, dtype, device or setting is not one of these.
    """
    numel = check.vector(x)
    chunk = check.chunk_of(chunk, numel)
    memory = check.memory(x, numel, residual, updated, alpha, decay, sent)
    count = layout.blocks(numel, chunk)
    indices = torch.empty(count, dtype=torch.int32, device=x.device)
    values = torch.empty(count, dtype=torch.float32, device=x.device)
    _bodies(x).chunk_select(x, chunk, memory, indices, values)
    return indices, values


def chunk_gather(
    x: Tensor,
    indices: Tensor,
    chunk: int,
    residual: Tensor | None = None,
    alpha: float = 1.0,
    decay: float = 1.0,
    sent: float = 1.0,
    *,
    updated: Tensor | None = None,
) -> Tensor:
    """``p = x + alpha * residual`` at given offsets, one per chunk; the memory is updated as by `chunk_select`.

    A chunk with a NaN or Inf in p has value NaN and keeps its memory. An index outside its chunk (it can only be one
    beyond a short last chunk) names nothing: its value is 0 and the whole chunk goes to the memory.

    Args:
        x: fp32, fp16 or bf16 [n], any stride.
        indices: int32 [ceil(n / chunk)], offsets inside the chunk.
        chunk: elements per chunk, at least 1.
        residual: memory, fp32 [n], or None.
        alpha, decay, sent: factors of the memory.
        updated: where the new memory goes, fp32 [n]; None means to ``residual``.

    Returns:
        fp32 [ceil(n / chunk)].

    Raises:
        CompressionError: a shape, dtype, device or setting is not one of these.
    """
    numel = check.vector(x)
    chunk = check.chunk_of(chunk, numel)
    memory = check.memory(x, numel, residual, updated, alpha, decay, sent)
    count = layout.blocks(numel, chunk)
    check.indices(indices, count, x)
    values = torch.empty(count, dtype=torch.float32, device=x.device)
    _bodies(x).chunk_gather(x, indices, chunk, memory, values)
    return values
