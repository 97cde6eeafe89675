"""Sparse decode."""

from __future__ import annotations

from torch import Tensor

from .. import dispatch
from . import _checks as check

_bodies = dispatch.Bodies(__name__)


def scatter_add(indices: Tensor, values: Tensor, out: Tensor, weight: float = 1.0) -> Tensor:
    """``out[indices] += weight * values``, in place.

    Indices are unique within a call, so that no order of summation exists and the result is the same bits everywhere.
    On the CPU an index outside ``[0, out.numel())`` is an error and nothing is written; the GPU kernel skips it, since
    telling the host would cost a synchronisation.

    Args:
        indices: int32 or int64 [k], any stride.
        values: fp32 [k], any stride.
        out: fp32 [n], contiguous.
        weight: factor of the values.

    Returns:
        ``out``.

    Raises:
        CompressionError: a shape, dtype or device is not one of these, or an index is out of range on the CPU.
    """
    check.sparse(indices, values, out)
    _bodies(out).scatter_add(indices, values, out, weight)
    return out
