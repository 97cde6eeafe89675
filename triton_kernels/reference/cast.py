"""Reference of the float casts: bf16 and fp16 as they are, fp8 (e4m3) with one scale a block."""

from __future__ import annotations

import torch

from .. import layout
from ..layout import FP8_MAX, Memory
from ._memory import blocked, compensate, divide, mean_in_rank_order, per_element, remember, store

_HALF = {"bf16": (torch.bfloat16, 0x7FC0), "fp16": (torch.float16, 0x7E00)}  # dtype, the one NaN that is sent


def cast_encode(
    x: torch.Tensor,
    kind: str,
    block: int,
    residual: torch.Tensor | None = None,
    alpha: float = 1.0,
    decay: float = 1.0,
    sent: float = 1.0,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """``p = x + alpha * residual`` rounded to nearest even in a shorter format (K1).

    - ``bf16``, ``fp16``: no scales. NaN stays NaN (one canonical pattern), values out of range become Inf; the residual
      is left untouched, element by element, where the decoded value is not finite.
    - ``fp8``: e4m3 codes of ``p * (448 / max|p|)``, scale ``max|p| / 448`` a block. A block in which p has NaN or Inf
      gets the scale NaN, zero codes, and leaves its residual; a block so small that 448 / max|p| overflows is sent as
      zeros with scale 0.

    Args:
        x: fp32, fp16 or bf16 [n], any stride.
        kind: "bf16", "fp16" or "fp8".
        block: elements a scale, a multiple of 32; without effect on the 16-bit kinds.
        residual: fp32 [n], updated in place to ``decay * residual + x - sent * decode(payload)``, or None.
        out: uint8 [cast_bytes(n, kind, block)] to write to, 4-byte aligned, or None.
    """
    memory = Memory(residual, alpha, decay, sent)
    layout.check_kind(kind)
    layout.check_block(block)
    layout.check_input(x, memory)
    numel = x.numel()
    out = layout.payload_for(out, layout.cast_bytes(numel, kind, block), x)
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
    remember(x, cast_decode(out, numel, kind, block), keep, memory)
    return out


def cast_decode(
    payload: torch.Tensor,
    numel: int,
    kind: str,
    block: int,
    out: torch.Tensor | None = None,
    weight: float = 1.0,
    accumulate: bool = False,
) -> torch.Tensor:
    """Decodes to fp32 [numel]: ``out = weight * q``, or ``out += weight * q`` with ``accumulate``."""
    layout.check_kind(kind)
    layout.check_block(block)
    layout.check_payload(payload, layout.cast_bytes(numel, kind, block))
    out = layout.result_for(out, numel, payload, accumulate)
    scales, words = layout.split(payload, layout.cast_scales(numel, kind, block))
    if kind == "fp8":
        values = words.view(torch.float8_e4m3fn)[:numel].float() * per_element(scales, numel, block)
    else:
        values = words.view(_HALF[kind][0])[:numel].float()
    return store(values, out, weight, accumulate)


def cast_reduce(
    payloads: torch.Tensor,
    numel: int,
    kind: str,
    block: int,
    out: torch.Tensor | None = None,
    *,
    residual: torch.Tensor | None = None,
    alpha: float = 1.0,
    decay: float = 1.0,
    sent: float = 1.0,
) -> torch.Tensor:
    """Average of the decoded payloads, encoded again, in one pass (K2); see `sign_reduce`."""
    layout.check_kind(kind)
    layout.check_block(block)
    layout.check_payloads(payloads, layout.cast_bytes(numel, kind, block))
    average = mean_in_rank_order([cast_decode(payload, numel, kind, block) for payload in payloads])
    return cast_encode(average, kind, block, residual, alpha, decay, sent, out)
