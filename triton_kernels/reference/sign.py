"""Reference of the sign codec; contracts in ops/sign.py."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import layout
from ..layout import SCALE_MAX, Memory
from ..philox import Key, signed32
from ._memory import blocked, compensate, mean_in_rank_order, per_element, remember, store
from .pack import from_words, to_words


def sign_encode(x: Tensor, block: int, memory: Memory | None, out: Tensor) -> None:
    numel = x.numel()
    p = compensate(x, memory)
    scales, words = layout.split(out, layout.blocks(numel, block))
    counts = blocked(torch.ones_like(p, dtype=torch.float64), block).sum(1)
    mean = blocked(p.double().abs(), block).sum(1) / counts
    finite = mean.isfinite()
    scales.copy_(torch.where(finite, mean, torch.nan))
    words.copy_(to_words(p >= 0, 1))
    remember(x, _decoded(out, numel, block), ~per_element(finite, numel, block), memory)


def _decoded(payload: Tensor, numel: int, block: int) -> Tensor:
    scales, words = layout.split(payload, layout.blocks(numel, block))
    scale = per_element(scales, numel, block)
    return torch.where(from_words(words, numel, 1) == 1, scale, -scale)


def sign_decode(payload: Tensor, numel: int, block: int, out: Tensor, weight: float, accumulate: bool) -> None:
    store(_decoded(payload, numel, block), out, weight, accumulate)


def sign_reduce(payloads: Tensor, numel: int, block: int, out: Tensor) -> None:
    average = mean_in_rank_order([_decoded(payload, numel, block) for payload in payloads])
    sign_encode(average, block, None, out)


def sign_vote(payloads: Tensor, numel: int, out: Tensor) -> None:
    votes = torch.stack([from_words(words, numel, 1) for words in layout.split(payloads, 0)[1]]).sum(0)
    out.copy_(to_words(2 * votes >= payloads.shape[0], 1).view(torch.uint8))


def sign_draw(x: Tensor, key: Key, out: Tensor) -> None:
    numel = x.numel()
    scales, words = layout.split(out, min(1, numel))
    norm = x.double().square().sum().sqrt()
    scale = torch.where(norm.isfinite(), norm.clamp(max=SCALE_MAX), torch.nan).to(torch.float32)
    scales.fill_(scale)
    thresholds = signed32(key, numel, x.device).to(torch.float32) * 2**-31 * scale
    words.copy_(to_words(x.to(torch.float32) >= thresholds, 1))
