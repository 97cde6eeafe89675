"""Reference of the sparse decode; contract in ops/scatter.py."""

from __future__ import annotations

from torch import Tensor

from ...errors import CompressionError


def scatter_add(indices: Tensor, values: Tensor, out: Tensor, weight: float) -> None:
    if indices.numel():
        low, high = (int(bound) for bound in indices.aminmax())
        if low < 0 or high >= out.numel():
            raise out_of_range(low, high, out.numel())
    index = indices.long()
    out[index] = out[index] + weight * values


def out_of_range(low: int, high: int, numel: int) -> CompressionError:
    return CompressionError(f"indices must be in [0, {numel}), got values from {low} to {high}")
