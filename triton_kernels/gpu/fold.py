"""Triton kernels of the mergeable one-bit payloads; contracts in reference/fold.py.

A program owns ``WORDS`` 32-bit words, that is tiles [WORDS, 32] with one lane for each bit.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..checks import check_bit_pair, check_residual, draws_of, keep_left_below
from ..layout import check_buffer, check_payload, result_for, words
from ..philox import Key
from ._philox import KEY_ARGUMENTS, uniform16, words_of
from ._tile import compensate, load_x

WORDS = 64
_EVERY_DRAW = draws_of(0, 1)


@triton.jit
def _place(numel, WORDS: tl.constexpr):
    """Word index [WORDS], element index [WORDS, 32], and which elements exist."""
    word = tl.program_id(0).to(tl.int64) * WORDS + tl.arange(0, WORDS)
    index = word[:, None] * 32 + tl.arange(0, 32)[None, :]
    return word, index, index < numel


@triton.jit
def _draws(seed, tensor, first, step, rank, stream, WORDS: tl.constexpr):
    """Random halves of this program's elements, int32 [WORDS, 32]."""
    counter = tl.program_id(0).to(tl.int64) * (4 * WORDS) + tl.arange(0, 4 * WORDS)
    return uniform16(counter[None, :], seed, tensor, first, step, rank, stream).reshape(WORDS, 32)


@triton.jit
def _packed(bits):
    """Booleans [WORDS, 32] -> int32 words, LSB first; distinct bits, so the sum has no carry."""
    return tl.sum(bits.to(tl.int32) << tl.arange(0, 32)[None, :], axis=1)


@triton.jit(do_not_specialize=[*KEY_ARGUMENTS, "low", "high"])
def _encode(
    x, stride, r, bits, numel, low, high, seed, tensor, first, step, rank, stream,
    HAS_R: tl.constexpr, HAS_KEY: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    """Bits of ``(p >= 0) & (low <= h < high)``, without the second term for no key."""
    word, index, inside = _place(numel, WORDS)
    _, p = compensate(load_x(x, stride, index, inside), r, 1.0, index, inside, HAS_R)
    if HAS_R:
        tl.store(r + index, p, mask=inside)
    positive = (p >= 0) & inside
    if HAS_KEY:
        h = _draws(seed, tensor, first, step, rank, stream, WORDS)
        positive = positive & (h >= low) & (h < high)
    tl.store(bits + word, _packed(positive), mask=word * 32 < numel)


@triton.jit(do_not_specialize=[*KEY_ARGUMENTS, "below"])
def _merge(left, right, merged, numel, below, seed, tensor, first, step, rank, stream, WORDS: tl.constexpr):
    word, _, _ = _place(numel, WORDS)
    exists = word * 32 < numel
    keep = _packed(_draws(seed, tensor, first, step, rank, stream, WORDS) < below)
    a, b = tl.load(left + word, mask=exists), tl.load(right + word, mask=exists)
    tl.store(merged + word, b ^ ((a ^ b) & keep), mask=exists)


@triton.jit
def _expand(bits, result, r, numel, eta, HAS_R: tl.constexpr, WORDS: tl.constexpr):
    word, index, inside = _place(numel, WORDS)
    packed = tl.load(bits + word, mask=word * 32 < numel, other=0)
    bit = (packed[:, None] >> tl.arange(0, 32)[None, :]) & 1
    signed = tl.where(bit == 1, eta, -eta)
    tl.store(result + index, signed, mask=inside)
    if HAS_R:
        tl.store(r + index, tl.load(r + index, mask=inside) - signed, mask=inside)


def bit_merge(left: torch.Tensor, right: torch.Tensor, a: int, b: int, key: Key) -> torch.Tensor:
    check_bit_pair(left, right)
    below = keep_left_below(a, b)
    merged = torch.empty_like(left)
    views = (bits.view(torch.int32) for bits in (left, right, merged))
    _launch(_merge, left, 8 * left.numel(), *views, 8 * left.numel(), below, *words_of(key))
    return merged


def one_hot_signs(
    x: torch.Tensor, rank: int, size: int, key: Key, residual: torch.Tensor | None = None
) -> torch.Tensor:
    check_residual(x, residual)
    return _signs(x, residual, draws_of(rank, size), key)


def sign_bits(x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
    check_residual(x, residual)
    return _signs(x, residual, _EVERY_DRAW, None)


def signs_expand(
    bits: torch.Tensor,
    numel: int,
    eta: float,
    residual: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    check_payload(bits, 4 * words(numel, 1))
    if residual is not None:
        check_buffer(residual, bits, numel, "residual")
    result = result_for(out, numel, bits, accumulate=False)
    r = result if residual is None else residual.detach()
    _launch(_expand, bits, numel, bits.view(torch.int32), result, r, numel, float(eta), HAS_R=residual is not None)
    return result


def _signs(x: torch.Tensor, residual: torch.Tensor | None, draws: tuple[int, int], key: Key | None) -> torch.Tensor:
    numel = x.numel()
    bits = torch.empty(4 * words(numel, 1), dtype=torch.uint8, device=x.device)
    r = x if residual is None else residual
    arguments = x.detach(), x.stride(0), r.detach(), bits.view(torch.int32), numel, *draws, *words_of(key)
    _launch(_encode, x, numel, *arguments, HAS_R=residual is not None, HAS_KEY=key is not None)
    return bits


def _launch(kernel, like: torch.Tensor, numel: int, *arguments, **constants) -> None:
    """Runs ``kernel`` over ``numel`` bits; without FMA, to keep the bits of the CPU."""
    if numel:
        with torch.cuda.device_of(like):
            kernel[(triton.cdiv(numel, 32 * WORDS),)](*arguments, WORDS=WORDS, enable_fp_fusion=False, **constants)
