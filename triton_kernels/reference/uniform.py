"""Reference of the uniform codec; contracts in ops/uniform.py."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from .. import layout
from ..layout import Memory
from ..philox import Key, uniform
from ._memory import blocked, compensate, mean_in_rank_order, per_element, remember, store
from .pack import from_words, to_words


def uniform_encode(
    x: Tensor, bits: int, block: int, key: Key | None, l2: bool, memory: Memory | None, out: Tensor
) -> None:
    """``key``: None for rounding to nearest."""
    numel, levels = x.numel(), layout.uniform_levels(bits)
    scales, words = layout.split(out, layout.blocks(numel, block))
    p = compensate(x, memory)
    norm = _norms(blocked(p, block), l2)
    inverse = torch.full_like(norm, levels) / norm
    finite, zero = norm.isfinite(), inverse.isinf()
    scales.copy_(torch.where(zero, 0.0, norm))
    inverse = per_element(torch.where(zero | ~finite, 0.0, inverse), numel, block)
    u = 0.5 if key is None else uniform(key, numel, x.device)
    finite = per_element(finite, numel, block)
    codes = torch.floor(torch.where(finite, p, 0.0) * inverse + u).clamp(-levels, levels)
    words.copy_(to_words(codes.long(), bits))
    remember(x, _decoded(out, numel, bits, block), ~finite, memory)


def _norms(rows: Tensor, l2: bool) -> Tensor:
    """Scale of each row of finite numbers, at most SCALE_MAX -> fp32; NaN for a row with NaN or Inf."""
    wide = rows.double().abs()
    norm = wide.square().sum(1).sqrt() if l2 else wide.amax(1)
    return torch.where(norm.isfinite(), norm.clamp(max=layout.SCALE_MAX), torch.nan).to(torch.float32)


def _decoded(payload: Tensor, numel: int, bits: int, block: int) -> Tensor:
    scales, words = layout.split(payload, layout.blocks(numel, block))
    step = per_element(scales / torch.full_like(scales, layout.uniform_levels(bits)), numel, block)
    codes = from_words(words, numel, bits)
    codes = codes - ((codes >> (bits - 1)) << bits)
    return codes.to(torch.float32) * step


def uniform_decode(
    payload: Tensor, numel: int, bits: int, block: int, out: Tensor, weight: float, accumulate: bool
) -> None:
    store(_decoded(payload, numel, bits, block), out, weight, accumulate)


def uniform_reduce(payloads: Tensor, numel: int, bits: int, block: int, key: Key | None, l2: bool, out: Tensor) -> None:
    average = mean_in_rank_order([_decoded(payload, numel, bits, block) for payload in payloads])
    uniform_encode(average, bits, block, key, l2, None, out)


def uniform_average(payloads: Tensor, numel: int, bits: int, block: int, out: Tensor) -> None:
    out.copy_(mean_in_rank_order([_decoded(payload, numel, bits, block) for payload in payloads]))


def uniform_round(x: Tensor, bits: int, scale: float, key: Key, out: Tensor) -> None:
    inverse, step = grid(bits, scale)
    levels = layout.uniform_levels(bits)
    codes = torch.floor(x * inverse + uniform(key, x.numel(), x.device)).clamp(-levels, levels)
    out.copy_(codes * step)


def grid(bits: int, scale: float) -> tuple[float, float]:
    """``(L / scale, scale / L)``, rounded to fp32; zeros where the first overflows."""
    levels, largest = np.float32(layout.uniform_levels(bits)), np.float32(scale)
    with np.errstate(divide="ignore", over="ignore"):
        inverse, step = float(levels / largest), float(largest / levels)
    return (inverse, step) if inverse < float("inf") else (0.0, 0.0)
