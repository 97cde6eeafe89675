"""Reference of the whole-tensor statistics (K0)."""

from __future__ import annotations

import torch

from ..layout import Memory, check_input
from ._memory import compensate


def stats(x: torch.Tensor, residual: torch.Tensor | None = None, alpha: float = 1.0) -> torch.Tensor:
    """Largest magnitude, sum of magnitudes and sum of squares of ``p = x + alpha * residual``, for global scales.

    Args:
        x: fp32, fp16 or bf16 [n], any stride.
        residual: fp32 [n] or None; read only.

    Returns:
        fp32 [3] ``(max |p|, sum |p|, sum p**2)``, summed in fp64. All three are NaN if any element of p is not finite,
        all zero if n is 0; a sum beyond the range of fp32 is inf.
    """
    memory = Memory(residual, alpha)
    check_input(x, memory)
    p = compensate(x, memory).double().abs()
    if not p.numel():
        return torch.zeros(3, device=x.device)
    result = torch.stack((p.amax(), p.sum(), p.square().sum()))
    return torch.where(result.isfinite().all(), result, torch.nan).to(torch.float32)
