"""Sparse decode on the CPU."""

from __future__ import annotations

import numpy as np
import torch

from ..checks import check_scatter, out_of_range
from ._jit import jit


def scatter_add(indices: torch.Tensor, values: torch.Tensor, out: torch.Tensor, weight: float = 1.0) -> torch.Tensor:
    check_scatter(indices, values, out)
    index = indices.contiguous().numpy()
    low, high = _bounds(index)
    if index.size and (low < 0 or high >= out.numel()):
        raise out_of_range(int(low), int(high), out.numel())
    _add(index, values.detach().contiguous().numpy(), out.detach().numpy(), np.float32(weight))
    return out


@jit
def _bounds(indices):
    low = high = indices[0] if indices.size else indices.dtype.type(0)
    for i in range(indices.size):
        low = indices[i] if indices[i] < low else low
        high = indices[i] if indices[i] > high else high
    return low, high


@jit
def _add(indices, values, out, weight):
    for i in range(indices.size):
        out[indices[i]] += weight * values[i]
