"""Reference of the sign codec: one bit an element, one scale (mean magnitude) a block."""

from __future__ import annotations

import torch

from .. import layout
from ..layout import SCALE_MAX, Memory
from ..philox import Key, signed32
from ._memory import blocked, compensate, descend, mean_in_rank_order, per_element, remember, store
from .pack import from_words, to_words


def sign_encode(
    x: torch.Tensor,
    block: int,
    residual: torch.Tensor | None = None,
    alpha: float = 1.0,
    decay: float = 1.0,
    sent: float = 1.0,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Sign of ``p = x + alpha * residual`` with the mean of |p| over each block as its scale (K1).

    A block in which p has NaN or Inf gets the scale NaN and leaves its residual untouched. Zero counts as positive.
    Karimireddy et al., "Error feedback fixes signSGD and other gradient compression schemes", ICML 2019.

    Args:
        x: fp32, fp16 or bf16 [n], any stride.
        block: elements a scale, a multiple of 32.
        residual: fp32 [n], updated in place to ``decay * residual + x - sent * decode(payload)``, or None.
        out: uint8 [4 * ceil(n / block) + 4 * ceil(n / 32)] to write to, 4-byte aligned, or None.

    Returns:
        The payload ``[scales | bits]``.
    """
    memory = Memory(residual, alpha, decay, sent)
    layout.check_block(block)
    layout.check_input(x, memory)
    numel = x.numel()
    out = layout.payload_for(out, layout.sign_bytes(numel, block), x)
    p = compensate(x, memory)
    scales, words = layout.split(out, layout.blocks(numel, block))
    counts = blocked(torch.ones_like(p, dtype=torch.float64), block).sum(1)
    mean = blocked(p.double().abs(), block).sum(1) / counts
    finite = mean.isfinite()
    scales.copy_(torch.where(finite, mean, torch.nan))
    words.copy_(to_words(p >= 0, 1))
    remember(x, sign_decode(out, numel, block), ~per_element(finite, numel, block), memory)
    return out


def sign_decode(
    payload: torch.Tensor,
    numel: int,
    block: int,
    out: torch.Tensor | None = None,
    weight: float = 1.0,
    accumulate: bool = False,
) -> torch.Tensor:
    """Decodes to fp32 [numel]: ``out = weight * q``, or ``out += weight * q`` with ``accumulate``."""
    layout.check_block(block)
    layout.check_payload(payload, layout.sign_bytes(numel, block))
    out = layout.result_for(out, numel, payload, accumulate)
    scales, words = layout.split(payload, layout.blocks(numel, block))
    scale = per_element(scales, numel, block)
    return store(torch.where(from_words(words, numel, 1) == 1, scale, -scale), out, weight, accumulate)


def sign_reduce(
    payloads: torch.Tensor,
    numel: int,
    block: int,
    out: torch.Tensor | None = None,
    *,
    residual: torch.Tensor | None = None,
    alpha: float = 1.0,
    decay: float = 1.0,
    sent: float = 1.0,
) -> torch.Tensor:
    """Average of the decoded payloads, encoded again, in one pass (K2): the owner's step of a two-stage collective.

    Args:
        payloads: uint8 [ranks, sign_bytes(numel, block)], contiguous. Summed in rank order, divided by ranks.
        residual: memory of the owner, as in `sign_encode` with the average in the place of x.
    """
    layout.check_block(block)
    layout.check_payloads(payloads, layout.sign_bytes(numel, block))
    average = mean_in_rank_order([sign_decode(payload, numel, block) for payload in payloads])
    return sign_encode(average, block, residual, alpha, decay, sent, out)


def sign_vote(payloads: torch.Tensor, numel: int) -> torch.Tensor:
    """Majority of bare sign bits; a tie gives 1.

    Bernstein et al., "signSGD with majority vote is communication efficient and fault tolerant", ICLR 2019.

    Args:
        payloads: uint8 [ranks, 4 * ceil(numel / 32)], contiguous.

    Returns:
        uint8 [4 * ceil(numel / 32)], padded with zero bits.
    """
    layout.check_payloads(payloads, 4 * layout.words(numel, 1))
    votes = torch.stack([from_words(words, numel, 1) for words in layout.split(payloads, 0)[1]]).sum(0)
    return to_words(2 * votes >= payloads.shape[0], 1).view(torch.uint8)


def sign_apply(
    payload: torch.Tensor,
    param: torch.Tensor,
    block: int,
    lr: float,
    momentum_buffer: torch.Tensor | None = None,
    momentum: float = 0.0,
) -> None:
    """``param -= lr * decode(payload)`` in place, in one pass (K3).

    With ``momentum_buffer`` (fp32 [n], updated in place) heavy ball: ``m = momentum * m + q; param -= lr * m``.
    ``param``: fp32 [n], contiguous.
    """
    numel = param.numel()
    layout.check_apply(payload, param, momentum_buffer)
    descend(param, sign_decode(payload, numel, block), lr, momentum_buffer, momentum)


def sign_draw(x: torch.Tensor, key: Key, out: torch.Tensor | None = None) -> torch.Tensor:
    """Draws +1 with probability (1 + x_j / |x|) / 2, under the Euclidean norm |x| as the one scale of the vector.

    Decoded, the mean over draws is x, and the sum of the variances (n - 1) |x|**2. Bit j is
    ``x_j >= (w_j * 2**-31) * |x|`` in fp32, w_j from `philox.signed32`: sixteen random bits, which serve the other
    codecs, would not resolve probabilities that differ from 1/2 by some 1 / sqrt(4 n). With NaN or Inf in x the scale
    is NaN; it is `layout.SCALE_MAX` at most.
    Safaryan, Richtarik, "Stochastic sign descent methods: new algorithms and better theory", ICML 2021.

    Args:
        x: fp32, fp16 or bf16 [n], any stride.
        out: uint8 [4 + 4 * ceil(n / 32)] to write to, 4-byte aligned, or None.

    Returns:
        The payload ``[scale | bits]``, empty for n = 0; `sign_decode` with block ``layout.single_block(n)`` reads it.
    """
    layout.check_input(x, Memory())
    numel, block = x.numel(), layout.single_block(x.numel())
    out = layout.payload_for(out, layout.sign_bytes(numel, block), x)
    scales, words = layout.split(out, layout.blocks(numel, block))
    norm = x.double().square().sum().sqrt()
    scale = torch.where(norm.isfinite(), norm.clamp(max=SCALE_MAX), torch.nan).to(torch.float32)
    scales.fill_(scale)
    thresholds = signed32(key, numel, x.device).to(torch.float32) * 2**-31 * scale
    words.copy_(to_words(x.to(torch.float32) >= thresholds, 1))
    return out
