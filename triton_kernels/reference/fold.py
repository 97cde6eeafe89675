"""One-bit payloads that merge without growing, in plain PyTorch (K6): Marsit's operator and its all-reduce form.

Marsit draws, for every coordinate, one rank uniformly and takes the sign of that rank's element, so that the mean of
the decoded vector is the mean of the signs. On a ring each hop merges the aggregate of ``a`` ranks with that of ``b``
ranks (``bit_merge``). With a Philox key that all ranks share, the drawn rank is known everywhere and a plain SUM of
words does the same (``one_hot_signs``): exactly one rank contributes to each bit, hence there is no carry.

Bits are packed LSB first into 4 * ceil(n / 32) bytes, 1 for p >= 0, zeros beyond n. A NaN counts as bit 0 (NaN >= 0 is
false); a caller that must tell it apart raises a flag of its own before it encodes.

Wu et al., "Sign bit is enough: a learning synchronization framework for multi-hop all-reduce with ultimate compression"
(Marsit), DAC 2022.
"""

from __future__ import annotations

import torch

from ..checks import check_bit_pair, check_residual, draws_of, keep_left_below
from ..layout import check_buffer, check_payload, result_for, words
from ..philox import Key, uniform16
from .pack import from_words, to_words


def bit_merge(left: torch.Tensor, right: torch.Tensor, a: int, b: int, key: Key) -> torch.Tensor:
    """Merge the packed bits of ``a`` ranks with those of ``b``: equal bits stay, else left's wins with a / (a + b).

    For b = 1 this is Marsit's operator ``v AND w OR (v XOR w) AND r``, P(r = 1) = (m - 1) / m where w = 0 and 1 / m
    where w = 1, m = a + 1. The probability is rounded to a multiple of 2**-16. Draw j of ``key`` decides bit j.

    Args:
        left, right: uint8, equal lengths, a multiple of 4 bytes.
        a, b: ranks aggregated in left and in right, at least 1.

    Returns:
        uint8, as long as the inputs.
    """
    check_bit_pair(left, right)
    below = keep_left_below(a, b)
    keep = to_words(uniform16(key, 8 * left.numel(), left.device) < below, 1).view(torch.uint8)
    return right ^ ((left ^ right) & keep)


def one_hot_signs(
    x: torch.Tensor, rank: int, size: int, key: Key, residual: torch.Tensor | None = None
) -> torch.Tensor:
    """Signs of ``p = x + r`` at the coordinates that ``key`` gives to ``rank``, 0 at all others; r <- p.

    With the same key on all ranks, rank ``(h_j * size) >> 16`` owns coordinate j, so the bitwise OR of the ``size``
    results, which is also their sum as integer words, holds the sign of one uniformly drawn rank for each coordinate.
    ``signs_expand`` closes the memory that this opens.

    Args:
        x: fp32, fp16 or bf16 [n], of any stride.
        rank, size: this rank and the number of ranks, at most 65536.
        key: equal on all ranks.
        residual: fp32 [n] or None; receives p.

    Returns:
        uint8 [4 * ceil(n / 32)].
    """
    check_residual(x, residual)
    draws_of(rank, size)
    mine = (uniform16(key, x.numel(), x.device).long() * size) >> 16 == rank
    return to_words((_compensated(x, residual) >= 0) & mine, 1).view(torch.uint8)


def sign_bits(x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
    """Packed signs of ``p = x + r``; r <- p.

    Args:
        x: fp32, fp16 or bf16 [n], of any stride.
        residual: fp32 [n] or None; receives p.

    Returns:
        uint8 [4 * ceil(n / 32)].
    """
    check_residual(x, residual)
    return to_words(_compensated(x, residual) >= 0, 1).view(torch.uint8)


def signs_expand(
    bits: torch.Tensor,
    numel: int,
    eta: float,
    residual: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """``+eta`` for bit 1, ``-eta`` for bit 0; ``r <- r - result``, Marsit's global compensation.

    Args:
        bits: uint8 [4 * ceil(numel / 32)].
        eta: step size, rounded to fp32.
        residual: fp32 [numel] or None, holding p; what the merged signs did not say stays in it.
        out: fp32 [numel] for the result, or None.

    Returns:
        fp32 [numel].
    """
    check_payload(bits, 4 * words(numel, 1))
    if residual is not None:
        check_buffer(residual, bits, numel, "residual")
    signs = 2 * from_words(bits.view(torch.int32), numel, 1) - 1
    result = result_for(out, numel, bits, accumulate=False)
    torch.mul(signs.to(torch.float32), eta, out=result)
    if residual is not None:
        residual.sub_(result)
    return result


def _compensated(x: torch.Tensor, residual: torch.Tensor | None) -> torch.Tensor:
    p = x.to(torch.float32)
    return p if residual is None else residual.add_(p)
