"""The sign codec: one bit per element, one scale (the mean magnitude) per block."""

from __future__ import annotations

from torch import Tensor

from .. import dispatch, layout
from ..philox import Key
from . import _checks as check

_bodies = dispatch.Bodies(__name__)


def sign_encode(
    x: Tensor,
    block: int,
    residual: Tensor | None = None,
    alpha: float = 1.0,
    decay: float = 1.0,
    sent: float = 1.0,
    out: Tensor | None = None,
    *,
    updated: Tensor | None = None,
) -> Tensor:
    """Sign of ``p = x + alpha * residual``, with the mean of |p| over each block as its scale.

    Zero counts as positive. A block in which p has NaN or Inf gets the scale NaN and keeps its memory.
    Karimireddy, Rebjock, Stich, Jaggi, "Error feedback fixes signSGD and other gradient compression schemes",
    ICML 2019, arXiv 1901.09847.

    Args:
        x: fp32, fp16 or bf16 [n], any stride.
        block: elements per scale, a multiple of 32.
        residual: memory, fp32 [n], or None.
        alpha, decay, sent: factors of the new memory ``decay * residual + x - sent * decode(payload)``.
        out: uint8 [4 * ceil(n / block) + 4 * ceil(n / 32)] to write to, 4-byte aligned, or None.
        updated: where the new memory goes, fp32 [n]; None means to ``residual``.

    Returns:
        The payload ``[scales | bits]``.

    Raises:
        CompressionError: a shape, dtype, device or setting is not one of these.
    """
    numel = check.vector(x)
    block = check.block_of(block, numel)
    memory = check.memory(x, numel, residual, updated, alpha, decay, sent)
    out = check.payload_out(out, layout.sign_bytes(numel, block), x)
    _bodies(x).sign_encode(x, block, memory, out)
    return out


def sign_decode(
    payload: Tensor,
    numel: int,
    block: int,
    out: Tensor | None = None,
    weight: float = 1.0,
    accumulate: bool = False,
) -> Tensor:
    """Decodes a payload of `sign_encode`: q is plus or minus the scale of its block.

    Args:
        payload: uint8 [sign_bytes(numel, block)].
        numel: elements of the decoded vector.
        block: elements per scale, as it was encoded.
        out: fp32 [numel] to write to, or None.
        weight: factor of q.
        accumulate: ``out += weight * q`` instead of ``out = weight * q``; needs ``out``.

    Returns:
        ``out``, or a new fp32 [numel].

    Raises:
        CompressionError: the payload has another size, or another argument is not one of these.
    """
    check.numel_of(numel)
    block = check.block_of(block, numel)
    check.payload(payload, layout.sign_bytes(numel, block))
    out = check.result_out(out, numel, payload, accumulate)
    _bodies(payload).sign_decode(payload, numel, block, out, weight, accumulate)
    return out


def sign_reduce(payloads: Tensor, numel: int, block: int, out: Tensor | None = None) -> Tensor:
    """Average of the decoded payloads, encoded again, in one pass: the owner's step of a two-stage collective.

    Args:
        payloads: uint8 [ranks, sign_bytes(numel, block)], contiguous. Summed in rank order, divided by ranks.
        numel: elements of the vector.
        block: elements per scale.
        out: uint8 [sign_bytes(numel, block)] to write to, 4-byte aligned, or None.

    Returns:
        The payload of the average.

    Raises:
        CompressionError: the payloads have another size, or another argument is not one of these.
    """
    check.numel_of(numel)
    block = check.block_of(block, numel)
    check.payloads(payloads, layout.sign_bytes(numel, block))
    out = check.payload_out(out, layout.sign_bytes(numel, block), payloads)
    _bodies(payloads).sign_reduce(payloads, numel, block, out)
    return out


def sign_vote(payloads: Tensor, numel: int) -> Tensor:
    """Majority of bare sign bits; a tie gives 1.

    Bernstein, Zhao, Azizzadenesheli, Anandkumar, "signSGD with majority vote is communication efficient and fault
    tolerant", ICLR 2019, arXiv 1810.05291.

    Args:
        payloads: uint8 [ranks, 4 * ceil(numel / 32)], contiguous.
        numel: bits per payload.

    Returns:
        uint8 [4 * ceil(numel / 32)], padded with zero bits.

    Raises:
        CompressionError: the payloads have another size.
    """
    check.numel_of(numel)
    size = 4 * layout.words(numel, 1)
    check.payloads(payloads, size)
    out = check.payload_out(None, size, payloads)
    _bodies(payloads).sign_vote(payloads, numel, out)
    return out


def sign_draw(x: Tensor, key: Key, out: Tensor | None = None) -> Tensor:
    """Draws +1 with probability (1 + x_j / |x|) / 2, under the Euclidean norm |x| as the one scale of the vector.

    Decoded, the mean over draws is x, and the sum of the variances (n - 1) |x|**2. Bit j is
    ``x_j >= (w_j * 2**-31) * |x|`` in fp32, w_j from `philox.signed32`: sixteen random bits, which serve the other
    codecs, would not resolve probabilities that differ from 1/2 by some 1 / sqrt(4 n). With NaN or Inf in x the scale
    is NaN; it is ``layout.SCALE_MAX`` at most.
    Safaryan, Richtarik, "Stochastic sign descent methods: new algorithms and better theory", ICML 2021,
    arXiv 1905.12938.

    Args:
        x: fp32, fp16 or bf16 [n], any stride.
        key: names the random numbers.
        out: uint8 [4 + 4 * ceil(n / 32)] to write to, 4-byte aligned, or None.

    Returns:
        The payload ``[scale | bits]``, empty for n = 0; `sign_decode` with block ``layout.single_block(n)`` reads it.

    Raises:
        CompressionError: a shape, dtype, device or the key is not one of these.
    """
    numel = check.vector(x)
    block = check.block_of(layout.single_block(numel), numel)
    out = check.payload_out(out, layout.sign_bytes(numel, block), x)
    _bodies(x).sign_draw(x, key, out)
    return out
