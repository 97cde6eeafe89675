"""One-bit payloads that merge without growing: Marsit's operator and its all-reduce form.

Marsit draws, for every coordinate, one rank uniformly and takes the sign of that rank's element, so that the mean of
the decoded vector is the mean of the signs. On a ring each hop merges the aggregate of ``a`` ranks with that of ``b``
ranks (``bit_merge``). With a Philox key that all ranks share, the drawn rank is known everywhere and a plain SUM of
words does the same (``one_hot_signs``): exactly one rank contributes to each bit, hence there is no carry.

Bits are packed LSB first into 4 * ceil(n / 32) bytes, 1 for p >= 0, zeros beyond n. A NaN counts as bit 0 (NaN >= 0 is
false); a caller that must tell it apart raises a flag of its own before it encodes.

Wu, He, Guo, Qu, Wang, Zhuang, Zhang, "Sign bit is enough: a learning synchronization framework for multi-hop all-reduce
with ultimate compression" (Marsit), DAC 2022, arXiv 2204.06787.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from .. import dispatch, layout
from ..philox import Key
from . import _checks as check

_bodies = dispatch.Bodies(__name__)


def bit_merge(left: Tensor, right: Tensor, a: int, b: int, key: Key) -> Tensor:
    """Merges the packed bits of ``a`` ranks with those of ``b``: equal bits stay, else left's wins with a / (a + b).

    For b = 1 this is Marsit's operator ``v AND w OR (v XOR w) AND r``, P(r = 1) = (m - 1) / m where w = 0 and 1 / m
    where w = 1, m = a + 1. The probability is rounded to a multiple of 2**-16. Draw j of ``key`` decides bit j.

    Args:
        left, right: uint8, equal lengths, a multiple of 4 bytes.
        a, b: ranks aggregated in left and in right, at least 1.
        key: names the random numbers.

    Returns:
        uint8, as long as the inputs.

    Raises:
        CompressionError: the two differ in length or device, or ``a`` or ``b`` is below 1.
    """
    check.bit_pair(left, right)
    check.share(a, b)
    merged = check.payload_out(None, left.numel(), left)
    _bodies(left).bit_merge(left, right, layout.keep_left_below(a, b), key, merged)
    return merged


def one_hot_signs(
    x: Tensor,
    rank: int,
    size: int,
    key: Key,
    residual: Tensor | None = None,
    *,
    updated: Tensor | None = None,
) -> Tensor:
    """Signs of ``p = x + residual`` at the coordinates that ``key`` gives to ``rank``, 0 at all others.

    With the same key on all ranks, rank ``(h_j * size) >> 16`` owns coordinate j, so the bitwise OR of the ``size``
    results, which is also their sum as integer words, holds the sign of one uniformly drawn rank for each coordinate.
    The new memory is p; `signs_expand` closes the memory that this opens.

    Args:
        x: fp32, fp16 or bf16 [n], any stride.
        rank, size: this rank and the number of ranks, at most 65536.
        key: equal on all ranks.
        residual: memory, fp32 [n], or None.
        updated: where the new memory goes, fp32 [n]; None means to ``residual``.

    Returns:
        uint8 [4 * ceil(n / 32)].

    Raises:
        CompressionError: a shape, dtype or device is not one of these, or ``rank`` is outside its group.
    """
    numel = check.vector(x)
    check.rank_of(rank, size)
    memory = check.memory(x, numel, residual, updated)
    bits = check.payload_out(None, 4 * layout.words(numel, 1), x)
    _bodies(x).one_hot_signs(x, rank, size, key, memory, bits)
    return bits


def sign_bits(x: Tensor, residual: Tensor | None = None, *, updated: Tensor | None = None) -> Tensor:
    """Packed signs of ``p = x + residual``; the new memory is p.

    Args:
        x: fp32, fp16 or bf16 [n], any stride.
        residual: memory, fp32 [n], or None.
        updated: where the new memory goes, fp32 [n]; None means to ``residual``.

    Returns:
        uint8 [4 * ceil(n / 32)].

    Raises:
        CompressionError: a shape, dtype or device is not one of these.
    """
    numel = check.vector(x)
    memory = check.memory(x, numel, residual, updated)
    bits = check.payload_out(None, 4 * layout.words(numel, 1), x)
    _bodies(x).sign_bits(x, memory, bits)
    return bits


def signs_expand(
    bits: Tensor,
    numel: int,
    eta: float,
    residual: Tensor | None = None,
    out: Tensor | None = None,
    *,
    updated: Tensor | None = None,
) -> Tensor:
    """``+eta`` for bit 1, ``-eta`` for bit 0; the new memory is ``residual - result``, Marsit's global compensation.

    Args:
        bits: uint8 [4 * ceil(numel / 32)].
        numel: elements of the result.
        eta: step size, rounded to fp32.
        residual: memory, fp32 [numel], holding p, or None; what the merged signs did not say stays in it.
        out: fp32 [numel] for the result, or None.
        updated: where the new memory goes, fp32 [numel]; None means to ``residual``.

    Returns:
        ``out``, or a new fp32 [numel].

    Raises:
        CompressionError: the bits have another length, or another argument is not one of these.
    """
    check.numel_of(numel)
    check.payload(bits, 4 * layout.words(numel, 1))
    memory = check.memory(bits, numel, residual, updated)
    result = check.result_out(out, numel, bits)
    _bodies(bits).signs_expand(bits, numel, eta, memory, result)
    return result


def signs_expand_each(
    bits: Tensor,
    etas: Tensor,
    sizes: Sequence[int],
    residual: Tensor | None = None,
    out: Tensor | None = None,
    *,
    updated: Tensor | None = None,
) -> Tensor:
    """`signs_expand` of a vector whose parts, one after another, have step sizes of their own.

    Args:
        bits: uint8 [4 * ceil(n / 32)], n the sum of ``sizes``.
        etas: fp32 [parts], contiguous, the step size of each.
        sizes: elements of each part.
        residual, out, updated: as for `signs_expand`.

    Returns:
        ``out``, or a new fp32 [n].

    Raises:
        CompressionError: the bits have another length, ``etas`` another shape, dtype or device, or another argument is
            not one of these.
    """
    for size in sizes:
        check.numel_of(size)
    numel = sum(sizes)
    check.payload(bits, 4 * layout.words(numel, 1))
    check.parts(etas, len(sizes), bits)
    memory = check.memory(bits, numel, residual, updated)
    result = check.result_out(out, numel, bits)
    _bodies(bits).signs_expand_each(bits, etas, sizes, memory, result)
    return result
