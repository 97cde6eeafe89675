"""Sparse decode, in plain PyTorch (K7)."""

from __future__ import annotations

import torch

from ..checks import check_scatter, out_of_range


def scatter_add(indices: torch.Tensor, values: torch.Tensor, out: torch.Tensor, weight: float = 1.0) -> torch.Tensor:
    """``out[indices] += weight * values``, in place.

    Indices are unique within a call, so that no order of summation exists and the result is the same bits everywhere.
    On the CPU an index outside ``[0, out.numel())`` is an error and nothing is written; the GPU kernel skips it, since
    telling the host would cost a synchronisation.

    Args:
        indices: int32 or int64 [k].
        values: fp32 [k].
        out: fp32 [n], contiguous.

    Returns:
        ``out``.
    """
    check_scatter(indices, values, out)
    if indices.numel():
        low, high = (int(bound) for bound in indices.aminmax())
        if low < 0 or high >= out.numel():
            raise out_of_range(low, high, out.numel())
    index = indices.long()
    out[index] = out[index] + weight * values
    return out
