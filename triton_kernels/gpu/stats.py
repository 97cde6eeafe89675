"""Triton launcher of the whole-tensor statistics (K0); contract in reference/stats.py."""

from __future__ import annotations

import torch

from ..layout import Memory, check_input
from ._tile import MAX_COLUMNS, moments

_INFINITY = 0x7F800000


def stats(x, residual=None, alpha=1.0):
    memory = Memory(residual, alpha)
    check_input(x, memory)
    if not x.numel():
        return torch.zeros(3, device=x.device)
    largest, magnitudes, squares = moments(x, memory, MAX_COLUMNS)  # partial results, one a tile
    top = largest.amax()
    sums = torch.stack((top.view(torch.float32).double(), magnitudes.sum(), squares.sum()))
    return torch.where(top < _INFINITY, sums, torch.nan).to(torch.float32)
