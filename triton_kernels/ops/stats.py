"""Whole-tensor statistics, for global scales."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import dispatch
from . import _checks as check

_bodies = dispatch.Bodies(__name__)


def stats(x: Tensor, residual: Tensor | None = None, alpha: float = 1.0) -> Tensor:
    """Largest magnitude, sum of magnitudes and sum of squares of ``p = x + alpha * residual``.

    Args:
        x: fp32, fp16 or bf16 [n], any stride.
        residual: fp32 [n], only read, or None.
        alpha: factor of the residual.

    Returns:
        fp32 [3] ``(max |p|, sum |p|, sum p**2)``, summed in fp64. All three are NaN if any element of p is not finite,
        all zero if n is 0; a sum beyond the range of fp32 is inf.

    Raises:
        CompressionError: a shape, dtype or device is not one of these.
    """
    numel = check.vector(x)
    memory = check.memory(x, numel, residual, None, alpha)
    out = torch.empty(3, dtype=torch.float32, device=x.device)
    _bodies(x).stats(x, memory, out)
    return out
