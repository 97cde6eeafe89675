"""The float casts: bf16 and fp16 as they are, fp8 (e4m3) with one scale per block."""

from __future__ import annotations

from torch import Tensor

from .. import dispatch, layout
from . import _checks as check

_bodies = dispatch.Bodies(__name__)


def cast_encode(
    x: Tensor,
    kind: str,
    block: int,
    residual: Tensor | None = None,
    alpha: float = 1.0,
    decay: float = 1.0,
    sent: float = 1.0,
    out: Tensor | None = None,
    *,
    updated: Tensor | None = None,
) -> Tensor:
    """``p = x + alpha * residual`` rounded to nearest even in a shorter format.

    - ``bf16``, ``fp16``: no scales. NaN stays NaN (one canonical pattern), values out of range become Inf; an element
      whose decoded value is not finite keeps its memory.
    - ``fp8``: e4m3 codes of ``p * (448 / max|p|)``, and the scale ``max|p| / 448`` per block. A block in which p has
      NaN or Inf gets the scale NaN, zero codes, and keeps its memory; a block so small that 448 / max|p| overflows is
      sent as zeros with scale 0.

    The format e4m3: Micikevicius et al., "FP8 formats for deep learning", 2022, arXiv 2209.05433.

    Args:
        x: fp32, fp16 or bf16 [n], any stride.
        kind: "bf16", "fp16" or "fp8".
        block: elements per scale, a multiple of 32; without effect on the 16-bit kinds.
        residual: memory, fp32 [n], or None.
        alpha, decay, sent: factors of the new memory ``decay * residual + x - sent * decode(payload)``.
        out: uint8 [cast_bytes(n, kind, block)] to write to, 4-byte aligned, or None.
        updated: where the new memory goes, fp32 [n]; None means to ``residual``.

    Returns:
        The payload: ``[scales | codes]`` for fp8, ``[codes]`` for the others.

    Raises:
        CompressionError: a shape, dtype, device or setting is not one of these.
    """
    check.kind_of_cast(kind)
    numel = check.vector(x)
    block = check.block_of(block, numel)
    memory = check.memory(x, numel, residual, updated, alpha, decay, sent)
    out = check.payload_out(out, layout.cast_bytes(numel, kind, block), x)
    _bodies(x).cast_encode(x, kind, block, memory, out)
    return out


def cast_decode(
    payload: Tensor,
    numel: int,
    kind: str,
    block: int,
    out: Tensor | None = None,
    weight: float = 1.0,
    accumulate: bool = False,
) -> Tensor:
    """Decodes a payload of `cast_encode`. Codes that are NaN, those of e4m3 included, decode to NaN.

    Args:
        payload: uint8 [cast_bytes(numel, kind, block)].
        numel: elements of the decoded vector.
        kind, block: as it was encoded.
        out: fp32 [numel] to write to, or None.
        weight: factor of the decoded values q.
        accumulate: ``out += weight * q`` instead of ``out = weight * q``; needs ``out``.

    Returns:
        ``out``, or a new fp32 [numel].

    Raises:
        CompressionError: the payload has another size, or another argument is not one of these.
    """
    check.kind_of_cast(kind)
    check.numel_of(numel)
    block = check.block_of(block, numel)
    check.payload(payload, layout.cast_bytes(numel, kind, block))
    out = check.result_out(out, numel, payload, accumulate)
    _bodies(payload).cast_decode(payload, numel, kind, block, out, weight, accumulate)
    return out


def cast_reduce(payloads: Tensor, numel: int, kind: str, block: int, out: Tensor | None = None) -> Tensor:
    """Average of the decoded payloads, encoded again, in one pass: the owner's step of a two-stage collective.

    Args:
        payloads: uint8 [ranks, cast_bytes(numel, kind, block)], contiguous. Summed in rank order, divided by ranks.
        numel: elements of the vector.
        kind, block: as they were encoded, and as the average is.
        out: uint8 [cast_bytes(numel, kind, block)] to write to, 4-byte aligned, or None.

    Returns:
        The payload of the average.

    Raises:
        CompressionError: the payloads have another size, or another argument is not one of these.
    """
    check.kind_of_cast(kind)
    check.numel_of(numel)
    block = check.block_of(block, numel)
    check.payloads(payloads, layout.cast_bytes(numel, kind, block))
    out = check.payload_out(out, layout.cast_bytes(numel, kind, block), payloads)
    _bodies(payloads).cast_reduce(payloads, numel, kind, block, out)
    return out
