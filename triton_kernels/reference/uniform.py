"""Reference of the uniform codec: signed codes of 2, 4, 8 or 16 bits on an equidistant grid, one scale a block."""

from __future__ import annotations

import numpy as np
import torch

from .. import layout
from ..layout import Memory
from ..philox import Key, uniform
from ._memory import blocked, compensate, descend, mean_in_rank_order, per_element, remember, store
from .pack import from_words, to_words


def uniform_encode(
    x: torch.Tensor,
    bits: int,
    block: int,
    key: Key | None = None,
    scale: str = "absmax",
    rounding: str = "stochastic",
    residual: torch.Tensor | None = None,
    alpha: float = 1.0,
    decay: float = 1.0,
    sent: float = 1.0,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Rounds ``p = x + alpha * residual`` to codes of a uniform grid in [-scale, scale] (K1).

    ``code = clip(floor(p * (L / scale) + u), -L, L)``, L = 2**(bits-1) - 1. ``u`` is uniform from Philox ("stochastic",
    unbiased up to fp32 rounding) or 1/2 ("nearest"). The scale of a block is its largest magnitude or its Euclidean
    norm. Special blocks:

    - p has NaN or Inf: scale NaN, codes 0, residual untouched;
    - all zero, or so small that L / scale overflows fp32 (scale below L * 2.9e-39): scale 0, codes 0, so that the
      residual keeps p whole;
    - scale beyond ``layout.SCALE_MAX`` (3.4028e38): that value, so that decoding cannot overflow.

    Alistarh et al., "QSGD: communication-efficient SGD via gradient quantization and encoding", NeurIPS 2017.

    Args:
        x: fp32, fp16 or bf16 [n], any stride.
        block: elements a scale, a multiple of 32.
        key: needed by stochastic rounding.
        residual: fp32 [n], updated in place to ``decay * residual + x - sent * decode(payload)``, or None.
        out: uint8 [4 * ceil(n / block) + 4 * ceil(n * bits / 32)] to write to, 4-byte aligned, or None.

    Returns:
        The payload ``[scales | codes]``, codes in two's complement.
    """
    memory = Memory(residual, alpha, decay, sent)
    layout.check_uniform(bits, block, key, scale, rounding)
    layout.check_input(x, memory)
    numel, levels = x.numel(), layout.uniform_levels(bits)
    out = layout.payload_for(out, layout.uniform_bytes(numel, bits, block), x)
    scales, words = layout.split(out, layout.blocks(numel, block))
    p = compensate(x, memory)
    norm = _norms(blocked(p, block), scale)
    inverse = torch.full_like(norm, levels) / norm
    finite, zero = norm.isfinite(), inverse.isinf()
    scales.copy_(torch.where(zero, 0.0, norm))
    inverse = per_element(torch.where(zero | ~finite, 0.0, inverse), numel, block)
    u = uniform(key, numel, x.device) if key is not None and rounding == "stochastic" else 0.5
    finite = per_element(finite, numel, block)
    codes = torch.floor(torch.where(finite, p, 0.0) * inverse + u).clamp(-levels, levels)
    words.copy_(to_words(codes.long(), bits))
    remember(x, uniform_decode(out, numel, bits, block), ~finite, memory)
    return out


def _norms(rows: torch.Tensor, scale: str) -> torch.Tensor:
    """Scale of each row of finite numbers, at most SCALE_MAX -> fp32; NaN for a row with NaN or Inf."""
    wide = rows.double().abs()
    norm = wide.amax(1) if scale == "absmax" else wide.square().sum(1).sqrt()
    return torch.where(norm.isfinite(), norm.clamp(max=layout.SCALE_MAX), torch.nan).to(torch.float32)


def uniform_decode(
    payload: torch.Tensor,
    numel: int,
    bits: int,
    block: int,
    out: torch.Tensor | None = None,
    weight: float = 1.0,
    accumulate: bool = False,
) -> torch.Tensor:
    """Decodes to fp32 [numel], ``q = code * (scale / L)``: ``out = weight * q``, or ``out += weight * q``."""
    layout.check_bits(bits)
    layout.check_block(block)
    layout.check_payload(payload, layout.uniform_bytes(numel, bits, block))
    out = layout.result_for(out, numel, payload, accumulate)
    scales, words = layout.split(payload, layout.blocks(numel, block))
    step = per_element(scales / torch.full_like(scales, layout.uniform_levels(bits)), numel, block)
    codes = from_words(words, numel, bits)
    codes = codes - ((codes >> (bits - 1)) << bits)
    return store(codes.to(torch.float32) * step, out, weight, accumulate)


def uniform_reduce(
    payloads: torch.Tensor,
    numel: int,
    bits: int,
    block: int,
    key: Key | None = None,
    scale: str = "absmax",
    rounding: str = "stochastic",
    out: torch.Tensor | None = None,
    *,
    residual: torch.Tensor | None = None,
    alpha: float = 1.0,
    decay: float = 1.0,
    sent: float = 1.0,
) -> torch.Tensor:
    """Average of the decoded payloads, encoded again, in one pass (K2): the owner's step of a two-stage collective.

    Args:
        payloads: uint8 [ranks, uniform_bytes(numel, bits, block)], contiguous. Summed in rank order, divided by ranks.
        residual: memory of the owner, as in `uniform_encode` with the average in the place of x.
    """
    layout.check_uniform(bits, block, key, scale, rounding)
    layout.check_payloads(payloads, layout.uniform_bytes(numel, bits, block))
    average = mean_in_rank_order([uniform_decode(payload, numel, bits, block) for payload in payloads])
    return uniform_encode(average, bits, block, key, scale, rounding, residual, alpha, decay, sent, out)


def uniform_average(
    payloads: torch.Tensor, numel: int, bits: int, block: int, out: torch.Tensor | None = None
) -> torch.Tensor:
    """Mean of the decoded payloads, fp32 [numel], in one pass: summed in rank order, divided by ranks.

    Args:
        payloads: uint8 [ranks, uniform_bytes(numel, bits, block)], contiguous.
    """
    layout.check_bits(bits)
    layout.check_block(block)
    layout.check_payloads(payloads, layout.uniform_bytes(numel, bits, block))
    out = layout.result_for(out, numel, payloads, False)
    return out.copy_(mean_in_rank_order([uniform_decode(payload, numel, bits, block) for payload in payloads]))


def uniform_apply(
    payload: torch.Tensor,
    param: torch.Tensor,
    bits: int,
    block: int,
    lr: float,
    momentum_buffer: torch.Tensor | None = None,
    momentum: float = 0.0,
) -> None:
    """``param -= lr * decode(payload)`` in place, in one pass (K3); heavy ball as in `sign_apply`."""
    numel = param.numel()
    layout.check_apply(payload, param, momentum_buffer)
    descend(param, uniform_decode(payload, numel, bits, block), lr, momentum_buffer, momentum)


def uniform_round(x: torch.Tensor, bits: int, scale: float, key: Key, out: torch.Tensor | None = None) -> torch.Tensor:
    """``q = clip(floor(x * (L / scale) + u), -L, L) * (scale / L)``: stochastic rounding to a grid, nothing packed.

    What `uniform_decode` makes of a payload of one block whose scale is ``scale``, for a number that stays where it is.

    Args:
        x: fp32 [n], contiguous, finite.
        scale: at least max |x|, or q is clipped and biased; where L / scale overflows fp32 all of q is 0.
        out: fp32 [n] to write to, x itself perhaps, or None.
    """
    out = layout.check_round(x, bits, scale, out)
    inverse, step = grid(bits, scale)
    levels = layout.uniform_levels(bits)
    codes = torch.floor(x * inverse + uniform(key, x.numel(), x.device)).clamp(-levels, levels)
    return out.copy_(codes * step)


def grid(bits: int, scale: float) -> tuple[float, float]:
    """``(L / scale, scale / L)``, rounded to fp32; zeros where the first overflows."""
    levels, largest = np.float32(layout.uniform_levels(bits)), np.float32(scale)
    with np.errstate(divide="ignore", over="ignore"):
        inverse, step = float(levels / largest), float(largest / levels)
    return (inverse, step) if inverse < float("inf") else (0.0, 0.0)
