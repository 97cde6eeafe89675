"""The uniform codec: signed codes of 2, 4, 8 or 16 bits on an equidistant grid, one scale per block."""

from __future__ import annotations

import torch
from torch import Tensor

from ...errors import CompressionError
from .. import dispatch, layout
from ..philox import Key
from . import _checks as check

_bodies = dispatch.Bodies(__name__)


def uniform_encode(
    x: Tensor,
    bits: int,
    block: int,
    key: Key | None = None,
    scale: str = "absmax",
    rounding: str = "stochastic",
    residual: Tensor | None = None,
    alpha: float = 1.0,
    decay: float = 1.0,
    sent: float = 1.0,
    out: Tensor | None = None,
    *,
    updated: Tensor | None = None,
) -> Tensor:
    """Rounds ``p = x + alpha * residual`` to codes of a uniform grid in [-scale, scale].

    ``code = clip(floor(p * (L / scale) + u), -L, L)``, L = 2**(bits-1) - 1. ``u`` is uniform from Philox ("stochastic",
    unbiased up to fp32 rounding) or 1/2 ("nearest"). The scale of a block is its largest magnitude or its Euclidean
    norm. Special blocks:

    - p has NaN or Inf: scale NaN, codes 0, and the block keeps its memory;
    - all zero, or so small that L / scale overflows fp32 (scale below L * 2.9e-39): scale 0, codes 0, so that the
      memory keeps p whole;
    - scale beyond ``layout.SCALE_MAX`` (3.4028e38): that value, so that decoding cannot overflow.

    Alistarh, Grubic, Li, Tomioka, Vojnovic, "QSGD: communication-efficient SGD via gradient quantization and encoding",
    NeurIPS 2017, arXiv 1610.02132.

    Args:
        x: fp32, fp16 or bf16 [n], any stride.
        bits: bits per code: 2, 4, 8 or 16.
        block: elements per scale, a multiple of 32.
        key: names the random numbers; stochastic rounding needs one.
        scale: "absmax" or "l2".
        rounding: "stochastic" or "nearest".
        residual: memory, fp32 [n], or None.
        alpha, decay, sent: factors of the new memory ``decay * residual + x - sent * decode(payload)``.
        out: uint8 [4 * ceil(n / block) + 4 * ceil(n * bits / 32)] to write to, 4-byte aligned, or None.
        updated: where the new memory goes, fp32 [n]; None means to ``residual``.

    Returns:
        The payload ``[scales | codes]``, codes in two's complement.

    Raises:
        CompressionError: a shape, dtype, device or setting is not one of these.
    """
    check.bits_of_code(bits)
    check.rounding_of(key, scale, rounding)
    numel = check.vector(x)
    block = check.block_of(block, numel)
    memory = check.memory(x, numel, residual, updated, alpha, decay, sent)
    out = check.payload_out(out, layout.uniform_bytes(numel, bits, block), x)
    draws = key if rounding == "stochastic" else None
    _bodies(x).uniform_encode(x, bits, block, draws, scale == "l2", memory, out)
    return out


def uniform_decode(
    payload: Tensor,
    numel: int,
    bits: int,
    block: int,
    out: Tensor | None = None,
    weight: float = 1.0,
    accumulate: bool = False,
) -> Tensor:
    """Decodes a payload of `uniform_encode`: ``q = code * (scale / L)``.

    Args:
        payload: uint8 [uniform_bytes(numel, bits, block)].
        numel: elements of the decoded vector.
        bits, block: as it was encoded.
        out: fp32 [numel] to write to, or None.
        weight: factor of q.
        accumulate: ``out += weight * q`` instead of ``out = weight * q``; needs ``out``.

    Returns:
        ``out``, or a new fp32 [numel].

    Raises:
        CompressionError: the payload has another size, or another argument is not one of these.
    """
    check.bits_of_code(bits)
    check.numel_of(numel)
    block = check.block_of(block, numel)
    check.payload(payload, layout.uniform_bytes(numel, bits, block))
    out = check.result_out(out, numel, payload, accumulate)
    _bodies(payload).uniform_decode(payload, numel, bits, block, out, weight, accumulate)
    return out


def uniform_reduce(
    payloads: Tensor,
    numel: int,
    bits: int,
    block: int,
    key: Key | None = None,
    scale: str = "absmax",
    rounding: str = "stochastic",
    out: Tensor | None = None,
) -> Tensor:
    """Average of the decoded payloads, encoded again, in one pass: the owner's step of a two-stage collective.

    Args:
        payloads: uint8 [ranks, uniform_bytes(numel, bits, block)], contiguous. Summed in rank order, divided by ranks.
        numel: elements of the vector.
        bits, block: as they were encoded, and as the average is.
        key, scale, rounding: of the average, as in `uniform_encode`.
        out: uint8 [uniform_bytes(numel, bits, block)] to write to, 4-byte aligned, or None.

    Returns:
        The payload of the average.

    Raises:
        CompressionError: the payloads have another size, or another argument is not one of these.
    """
    check.bits_of_code(bits)
    check.rounding_of(key, scale, rounding)
    check.numel_of(numel)
    block = check.block_of(block, numel)
    check.payloads(payloads, layout.uniform_bytes(numel, bits, block))
    out = check.payload_out(out, layout.uniform_bytes(numel, bits, block), payloads)
    draws = key if rounding == "stochastic" else None
    _bodies(payloads).uniform_reduce(payloads, numel, bits, block, draws, scale == "l2", out)
    return out


def uniform_average(payloads: Tensor, numel: int, bits: int, block: int, out: Tensor | None = None) -> Tensor:
    """Mean of the decoded payloads in one pass: summed in rank order, divided by ranks.

    Args:
        payloads: uint8 [ranks, uniform_bytes(numel, bits, block)], contiguous.
        numel: elements of the vector.
        bits, block: as they were encoded.
        out: fp32 [numel] to write to, or None.

    Returns:
        ``out``, or a new fp32 [numel].

    Raises:
        CompressionError: the payloads have another size, or another argument is not one of these.
    """
    check.bits_of_code(bits)
    check.numel_of(numel)
    block = check.block_of(block, numel)
    check.payloads(payloads, layout.uniform_bytes(numel, bits, block))
    out = check.result_out(out, numel, payloads)
    _bodies(payloads).uniform_average(payloads, numel, bits, block, out)
    return out


def uniform_round(x: Tensor, bits: int, scale: float, key: Key, out: Tensor | None = None) -> Tensor:
    """``q = clip(floor(x * (L / scale) + u), -L, L) * (scale / L)``: stochastic rounding to a grid, nothing packed.

    What `uniform_decode` makes of a payload of one block whose scale is ``scale``, for a number that stays where it is.

    Args:
        x: fp32 [n], contiguous, finite.
        bits: bits of a code of the grid: 2, 4, 8 or 16.
        scale: at least max |x|, or q is clipped and biased; where L / scale overflows fp32 all of q is 0.
        key: names the random numbers.
        out: fp32 [n] to write to, x itself perhaps, or None.

    Returns:
        ``out``, or a new fp32 [n].

    Raises:
        CompressionError: a shape, dtype, device or setting is not one of these.
    """
    check.bits_of_code(bits)
    numel = check.vector(x)
    if x.dtype != torch.float32 or not x.is_contiguous():
        raise CompressionError(f"x must be contiguous fp32, not {x.dtype} with stride {x.stride(0)}")
    if not 0 <= scale <= layout.SCALE_MAX:
        raise CompressionError(f"scale must be from 0 to {layout.SCALE_MAX:g}, not {scale}")
    out = check.result_out(out, numel, x)
    _bodies(x).uniform_round(x, bits, scale, key, out)
    return out
