"""Triton kernels of the mergeable one-bit payloads; contracts in ops/fold.py.

A program owns ``WORDS`` 32-bit words, that is tiles [WORDS, 32] with one lane for each bit.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..layout import draws_of
from ._philox import KEY_ARGUMENTS, uniform16, words_of
from ._tile import compensate, factors, load_x, mode_of

WORDS = 64
_EVERY_DRAW = 0, 65536


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
    x, stride, r, updated, bits, numel, low, high, seed, tensor, first, step, rank, stream,
    MEMORY: tl.constexpr, HAS_KEY: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    """Bits of ``(p >= 0) & (low <= h < high)``, without the second term for no key."""
    word, index, inside = _place(numel, WORDS)
    _, p = compensate(load_x(x, stride, index, inside), r, 1.0, index, inside, MEMORY)
    if MEMORY:
        tl.store(updated + index, p, mask=inside)
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
def _expand(bits, result, r, updated, numel, eta, MEMORY: tl.constexpr, WORDS: tl.constexpr):
    word, index, inside = _place(numel, WORDS)
    packed = tl.load(bits + word, mask=word * 32 < numel, other=0)
    bit = (packed[:, None] >> tl.arange(0, 32)[None, :]) & 1
    signed = tl.where(bit == 1, eta, -eta)
    tl.store(result + index, signed, mask=inside)
    if MEMORY:
        tl.store(updated + index, tl.load(r + index, mask=inside) - signed, mask=inside)


def bit_merge(left, right, below, key, merged):
    views = (bits.view(torch.int32) for bits in (left, right, merged))
    _launch(_merge, left, 8 * left.numel(), *views, 8 * left.numel(), below, *words_of(key))


def one_hot_signs(x, rank, size, key, memory, bits):
    _signs(x, memory, bits, draws_of(rank, size), key)


def sign_bits(x, memory, bits):
    _signs(x, memory, bits, _EVERY_DRAW, None)


def signs_expand(bits, numel, eta, memory, result):
    r, updated = factors(result, memory)[:2]
    arguments = bits.view(torch.int32), result, r, updated, numel, float(eta)
    _launch(_expand, bits, numel, *arguments, MEMORY=mode_of(memory))


def signs_expand_each(bits, etas, sizes, memory, result):
    """PyTorch multiplies the parts in one launch; a kernel would have to search each element's part."""
    signs_expand(bits, result.numel(), 1.0, None, result)
    torch._foreach_mul_(list(result.split(list(sizes))), list(etas))
    if memory is not None:
        torch.sub(memory.residual, result, out=memory.updated)


def _signs(x, memory, bits, draws, key):
    numel = x.numel()
    r, updated = factors(x, memory)[:2]
    arguments = x.detach(), x.stride(0), r, updated, bits.view(torch.int32), numel, *draws, *words_of(key)
    _launch(_encode, x, numel, *arguments, MEMORY=mode_of(memory), HAS_KEY=key is not None)


def _launch(kernel, like: torch.Tensor, numel: int, *arguments, **constants) -> None:
    """Runs ``kernel`` over ``numel`` bits; without FMA, to keep the bits of the CPU."""
    if numel:
        with torch.cuda.device_of(like):
            kernel[(triton.cdiv(numel, 32 * WORDS),)](*arguments, WORDS=WORDS, enable_fp_fusion=False, **constants)
