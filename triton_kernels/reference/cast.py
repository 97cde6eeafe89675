"""Reference of the float casts; contracts in ops/cast.py."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import layout
from ..layout import FP8_MAX, Memory
from ._memory import blocked, compensate, divide, mean_in_rank_order, per_element, remember, store

_HALF = {"bf16": (torch.bfloat16, 0x7FC0), "fp16": (torch.float16, 0x7E00)}  # dtype, the one NaN that is sent


def cast_encode(x: Tensor, kind: str, block: int, memory: Memory | None, out: Tensor) -> None:
    numel = x.numel()
    scales, words = layout.split(out, layout.cast_scales(numel, kind, block))
    p = compensate(x, memory)
    words.zero_()  # the padding
    if kind == "fp8":
        absmax = blocked(p.abs(), block).amax(1)
        broken, inverse = ~absmax.isfinite(), torch.full_like(absmax, FP8_MAX) / absmax
        zero = inverse.isinf()
        scales.copy_(torch.where(broken, torch.nan, torch.where(zero, 0.0, divide(absmax, FP8_MAX))))
        sendable = per_element(~(broken | zero), numel, block)
        scaled = torch.where(sendable, p * per_element(inverse, numel, block), 0.0)
        words.view(torch.float8_e4m3fn)[:numel] = scaled.to(torch.float8_e4m3fn)
        keep = per_element(broken, numel, block)
    else:
        dtype, nan = _HALF[kind]
        words.view(torch.int16)[:numel] = torch.where(p.isnan(), nan, p.to(dtype).view(torch.int16))
        keep = ~p.to(dtype).isfinite()
    remember(x, _decoded(out, numel, kind, block), keep, memory)


def _decoded(payload: Tensor, numel: int, kind: str, block: int) -> Tensor:
    scales, words = layout.split(payload, layout.cast_scales(numel, kind, block))
    if kind == "fp8":
        return words.view(torch.float8_e4m3fn)[:numel].float() * per_element(scales, numel, block)
    return words.view(_HALF[kind][0])[:numel].float()


def cast_decode(
    payload: Tensor, numel: int, kind: str, block: int, out: Tensor, weight: float, accumulate: bool
) -> None:
    store(_decoded(payload, numel, kind, block), out, weight, accumulate)


def cast_reduce(payloads: Tensor, numel: int, kind: str, block: int, out: Tensor) -> None:
    average = mean_in_rank_order([_decoded(payload, numel, kind, block) for payload in payloads])
    cast_encode(average, kind, block, None, out)
