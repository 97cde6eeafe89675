"""Sparse tensors with exactly one value in every run of `chunk` neighbours."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .. import triton_kernels as K
from .._lazy import torch

if TYPE_CHECKING:
    from torch import Tensor


def place_bits(chunk: int) -> int:
    """Bits of an offset inside a chunk of `chunk` elements."""
    return max(1, (chunk - 1).bit_length())


def chunk_scatter(indices: Tensor, values: Tensor, chunk: int, out: Tensor) -> Tensor:
    """`out` (fp32 [numel]), which becomes `values[i]` at place `indices[i]` of chunk i, and zero elsewhere.

    Args:
        indices: int32 [ceil(numel / chunk)], offsets inside each chunk.
        values: fp32, same length. A place beyond the end of a short last chunk must carry the value 0.
    """
    return chunk_add(indices, values, chunk, out.zero_())


def chunk_add(indices: Tensor, values: Tensor, chunk: int, out: Tensor) -> Tensor:
    """`out`, to which `values[i]` is added at place `indices[i]` of chunk i; arguments as in `chunk_scatter`."""
    starts = torch.arange(0, out.numel(), chunk, device=indices.device)
    places = (starts + indices).clamp_(max=out.numel() - 1)
    return K.scatter_add(places, values, out)
