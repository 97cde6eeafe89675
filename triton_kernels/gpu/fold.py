"""Triton kernels of the mergeable one-bit payloads; contracts in ops/fold.py.

An octet of elements is one byte of bits. There are no blocks: rows are those of the launch alone.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..layout import draws_of
from ._philox import KEY_ARGUMENTS, uniform16, words_of
from ._tile import (
    Geometry,
    compensate,
    factors,
    load_codes,
    mode_of,
    ones,
    pack,
    place,
    read,
    read_x,
    store_pieces,
    write,
)

_LAUNCH = 1024  # elements of a row
_EVERY_DRAW = 0, 65536


@triton.jit(do_not_specialize=[*KEY_ARGUMENTS, "low", "high"])
def _encode(
    x, stride, r, updated, bits, low, high, numel, block, seed, tensor, first, step, rank, stream, tiles,
    MEMORY: tl.constexpr, HAS_KEY: tl.constexpr, WHOLE: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Bits of ``(p >= 0) & (low <= h < high)``, without the second term for no key."""
    head, origin, left, octet, within = place(tiles, block, numel, ROWS, LANES)
    inside = within & (8 * octet < left)
    value = read_x(x, stride, origin, octet, inside, left, WHOLE)
    _, p = compensate(value, r, 1.0, origin, octet, inside, left, MEMORY, WHOLE)
    if MEMORY:
        write(updated + 8 * origin, octet, inside, left, p, WHOLE)
    positive = p >= 0
    if HAS_KEY:
        h = uniform16(origin + octet, seed, tensor, first, step, rank, stream)
        positive = positive & (h >= low) & (h < high)
    piece = pack(positive.to(tl.int32), 1, False) & ones(octet, left)
    store_pieces(bits, origin, octet, within, left, piece, 1, WHOLE)


@triton.jit(do_not_specialize=[*KEY_ARGUMENTS, "below"])
def _merge(
    left_bits, right_bits, merged, below, numel, block, seed, tensor, first, step, rank, stream, tiles,
    WHOLE: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    head, origin, left, octet, within = place(tiles, block, numel, ROWS, LANES)
    inside = within & (8 * octet < left)
    h = uniform16(origin + octet, seed, tensor, first, step, rank, stream)
    keep = tl.sum(pack((h < below).to(tl.int32), 1, False), axis=2)
    a = tl.load(left_bits + origin + octet, mask=inside)
    b = tl.load(right_bits + origin + octet, mask=inside)
    tl.store(merged + origin + octet, b ^ ((a ^ b) & keep.to(tl.uint8)), mask=inside)


@triton.jit
def _expand(
    bits, result, r, updated, eta, numel, block, tiles,
    MEMORY: tl.constexpr, WHOLE: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    head, origin, left, octet, within = place(tiles, block, numel, ROWS, LANES)
    inside = within & (8 * octet < left)
    bit = load_codes(bits, origin, octet, inside, left, 1, WHOLE) & 1
    signed = tl.where(bit == 1, eta, -eta)
    write(result + 8 * origin, octet, inside, left, signed, WHOLE)
    if MEMORY:
        new = read(r + 8 * origin, octet, inside, left, WHOLE) - signed
        write(updated + 8 * origin, octet, inside, left, new, WHOLE)


def bit_merge(left, right, below, key, merged):
    _launch(_merge, left, 8 * left.numel(), left, right, merged, below, key=key)


def one_hot_signs(x, rank, size, key, memory, bits):
    _signs(x, memory, bits, draws_of(rank, size), key)


def sign_bits(x, memory, bits):
    _signs(x, memory, bits, _EVERY_DRAW, None)


def signs_expand(bits, numel, eta, memory, result):
    cut = Geometry(numel, _LAUNCH)
    arguments = bits, result, *factors(result, memory)[:2], float(eta), numel, _LAUNCH
    cut.launch(_expand, bits, *arguments, MEMORY=mode_of(memory))


def signs_expand_each(bits, etas, sizes, memory, result):
    """PyTorch multiplies the parts in one launch; a kernel would have to search each element's part."""
    signs_expand(bits, result.numel(), 1.0, None, result)
    torch._foreach_mul_(list(result.split(list(sizes))), list(etas))
    if memory is not None:
        torch.sub(memory.residual, result, out=memory.updated)


def _signs(x, memory, bits, draws, key):
    arguments = x.detach(), x.stride(0), *factors(x, memory)[:2], bits, *draws
    _launch(_encode, x, x.numel(), *arguments, key=key, MEMORY=mode_of(memory), HAS_KEY=key is not None)


def _launch(kernel, like: torch.Tensor, numel: int, *arguments, key, **constants) -> None:
    Geometry(numel, _LAUNCH).launch(kernel, like, *arguments, numel, _LAUNCH, *words_of(key), **constants)
