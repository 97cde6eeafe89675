"""What the GPU kernels share: the cutting of a vector into tiles, the octets of a tile, and the memory of an encoder.

A tile is several whole blocks (rows) when blocks are short, one block when they are long, and a piece of one block when
they exceed ``MAX_COLUMNS``; then block scales come from a first pass over the input, `moments`. A lane of a tile holds
eight consecutive elements, an octet: two accesses of 128 bits in fp32, one counter of Philox, one word of 4-bit codes.
So tiles have the shape [ROWS, LANES, 8], a thread has whole octets, and packing moves nothing between threads. Blocks
are multiples of 32, so that only the last octet of a vector can be in part outside. Offsets inside a tile are int32,
from a 64-bit origin. Lanes outside the vector or block are masked: they never enter a scale, a code or a memory.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl

from ..layout import Memory, blocks
from ..reference._memory import divide

OCTET = 8
MAX_COLUMNS = 4096
ELEMENTS = 1024  # of a tile of short blocks, and of a warp: 32 a thread; a tile of one warp needs no barriers

_MANY = tl.constexpr(1 << 30)  # more elements than a tile has
# 2**(bits - 1) in every field of a piece, as int32
_HALVES_2, _HALVES_4 = tl.constexpr(0xAAAA), tl.constexpr(0x88888888 - 2**32)
_HALVES_8, _HALVES_16 = tl.constexpr(0x80808080 - 2**32), tl.constexpr(0x80008000 - 2**32)


class Geometry:
    """How ``numel`` elements in blocks of ``block`` are cut: tiles of ``rows`` x ``columns``, ``tiles`` a block."""

    def __init__(self, numel: int, block: int):
        span = min(block, max(32, numel))  # one block longer than the vector needs no more tiles than the vector
        self.columns = min(triton.next_power_of_2(span), MAX_COLUMNS)
        self.rows = max(1, ELEMENTS // self.columns)
        self.tiles = triton.cdiv(span, self.columns)
        self.programs = triton.cdiv(blocks(numel, block), self.rows) * self.tiles
        self.long = self.tiles > 1
        self.whole = numel % OCTET == 0

    def launch(self, kernel, like: torch.Tensor, *arguments, **constants) -> None:
        """Runs ``kernel(*arguments, tiles, WHOLE=, ROWS=, LANES=, **constants)``; no FMA, to keep the bits of the CPU.

        ``WHOLE``: no octet is in part outside the vector.
        """
        if not self.programs:
            return
        with torch.cuda.device_of(like):
            kernel[(self.programs,)](
                *arguments,
                self.tiles,
                WHOLE=self.whole,
                ROWS=self.rows,
                LANES=self.columns // OCTET,
                num_warps=max(1, self.columns // ELEMENTS),
                enable_fp_fusion=False,
                **constants,
            )


def factors(x: torch.Tensor, memory: Memory | None) -> tuple:
    """``(memory, what it becomes, alpha, decay, sent)``, with x in the place of no memory."""
    if memory is None:
        return x, x, 1.0, 1.0, 1.0
    r, updated, alpha, decay, sent = memory
    return r.detach(), updated.detach(), float(alpha), float(decay), float(sent)


def mode_of(memory: Memory | None) -> int:
    """What a kernel is compiled for: 0 for no memory, 1 for one updated in place, 2 for one that goes elsewhere."""
    return 0 if memory is None else 1 + memory.apart


def mean_of(payloads: torch.Tensor, numel: int, decode: Callable[..., None]) -> torch.Tensor:
    """Average of the decoded payloads, for blocks so long that their scale takes a pass of its own over it.

    ``decode(payload, out=, weight=, accumulate=)`` is the body of the decoder.
    """
    total = torch.empty(numel, dtype=torch.float32, device=payloads.device)
    for rank, payload in enumerate(payloads):
        decode(payload, out=total, weight=1.0, accumulate=rank > 0)
    return divide(total, len(payloads))


# --- places ---


@triton.jit
def place(tiles, block, numel, ROWS: tl.constexpr, LANES: tl.constexpr):
    """``(head, origin, left, octet, within)``: the tile's first block and first octet (int64), how many elements there
    are from that one on, each octet [ROWS, LANES] counted from it, and which of them are inside their block.
    """
    program = tl.program_id(0)
    head = (program // tiles).to(tl.int64) * ROWS
    skip = (program % tiles) * LANES
    origin = head * (block // 8) + skip
    left = tl.minimum(numel - 8 * origin, _MANY).to(tl.int32)
    lane = tl.arange(0, LANES)[None, :]
    octet = tl.arange(0, ROWS)[:, None] * (block // 8) + lane
    return head, origin, left, octet, tl.broadcast_to(lane < block // 8 - skip, [ROWS, LANES])


@triton.jit
def present(block, left, ROWS: tl.constexpr):
    """Which rows of the tile exist, [ROWS]."""
    return tl.arange(0, ROWS) * block < left


# --- accesses ---


@triton.jit
def _load(pointer, at, limit, inside, left, WHOLE: tl.constexpr, stride=1):
    """Where all octets of a program are whole, accesses are as wide as they can be."""
    place = pointer + at * stride
    exists = tl.broadcast_to(inside[:, :, None], at.shape)
    if WHOLE:
        value = tl.load(place, mask=exists, other=0)
    elif left >= 8 * inside.numel:
        value = tl.load(place, mask=exists, other=0)
    else:
        value = tl.load(place, mask=exists & (at < limit), other=0)
    return value


@triton.jit
def _store(pointer, at, limit, inside, left, value, WHOLE: tl.constexpr):
    exists = tl.broadcast_to(inside[:, :, None], at.shape)
    if WHOLE:
        tl.store(pointer + at, value, mask=exists)
    elif left >= 8 * inside.numel:
        tl.store(pointer + at, value, mask=exists)
    else:
        tl.store(pointer + at, value, mask=exists & (at < limit))


@triton.jit
def read(pointer, octet, inside, left, WHOLE: tl.constexpr, stride=1):
    """The octets counted from ``pointer``, [ROWS, LANES, 8], zero where nothing is.

    fp32 octets are two loads of 128 bits, put side by side in the registers of their thread.
    """
    if pointer.dtype.element_ty.primitive_bitwidth == 32:
        at = 8 * octet[:, :, None] + tl.arange(0, 4)[None, None, :]
        low = _load(pointer, at, left, inside, left, WHOLE, stride)
        high = _load(pointer, at + 4, left, inside, left, WHOLE, stride)
        value = tl.join(low, high).permute(0, 1, 3, 2).reshape(inside.shape[0], inside.shape[1], 8)
    else:
        at = 8 * octet[:, :, None] + tl.arange(0, 8)[None, None, :]
        value = _load(pointer, at, left, inside, left, WHOLE, stride)
    return value


@triton.jit
def write(pointer, octet, inside, left, value, WHOLE: tl.constexpr, PADDING: tl.constexpr = 1):
    """The inverse of `read`; up to a multiple of ``PADDING`` elements, which divides 8."""
    limit = tl.cdiv(left, PADDING) * PADDING
    if pointer.dtype.element_ty.primitive_bitwidth == 32:
        low, high = tl.split(value.reshape(inside.shape[0], inside.shape[1], 2, 4).permute(0, 1, 3, 2))
        at = 8 * octet[:, :, None] + tl.arange(0, 4)[None, None, :]
        _store(pointer, at, limit, inside, left, low, WHOLE)
        _store(pointer, at + 4, limit, inside, left, high, WHOLE)
    else:
        at = 8 * octet[:, :, None] + tl.arange(0, 8)[None, None, :]
        _store(pointer, at, limit, inside, left, value, WHOLE)


@triton.jit
def widened(value):
    """In fp32; bf16 by its bits, because Triton's interpreter loses subnormals."""
    if value.dtype == tl.bfloat16:
        return (value.to(tl.int16, bitcast=True).to(tl.int32) << 16).to(tl.float32, bitcast=True)
    return value.to(tl.float32)


@triton.jit
def read_x(x, stride, origin, octet, inside, left, WHOLE: tl.constexpr):
    """x in fp32."""
    return widened(read(x + 8 * origin * stride, octet, inside, left, WHOLE, stride))


@triton.jit
def compensate(value, r, alpha, origin, octet, inside, left, MEMORY: tl.constexpr, WHOLE: tl.constexpr):
    """``(r, p = x + alpha * r)``; without memory both are x."""
    old, p = value, value
    if MEMORY:
        old = read(r + 8 * origin, octet, inside, left, WHOLE)
        p = value + alpha * old
    return old, p


@triton.jit
def remember(updated, origin, octet, inside, left, finite, value, old, q, decay, sent, WHOLE: tl.constexpr):
    """The new memory: ``decay * r + x - sent * q`` where ``finite`` holds, per row or per element, and r elsewhere."""
    new = (decay * old + value) - sent * q
    write(updated + 8 * origin, octet, inside, left, tl.where(finite, new, old), WHOLE)


@triton.jit
def put(out, origin, octet, inside, left, value, weight, ACCUMULATE: tl.constexpr, WHOLE: tl.constexpr):
    """``out = weight * value`` or ``out += weight * value``."""
    result = weight * value
    if ACCUMULATE:
        result = read(out + 8 * origin, octet, inside, left, WHOLE) + result
    write(out + 8 * origin, octet, inside, left, result, WHOLE)


# --- codes: an octet of codes is one number of 8, 16 or 32 bits, or two or four words ---


def pieces(words: torch.Tensor, bits: int) -> torch.Tensor:
    """Code words as `store_pieces` and `load_codes` take them."""
    return words.view({1: torch.uint8, 2: torch.int16}.get(bits, torch.int32))


@triton.jit
def pack(value, BITS: tl.constexpr, SIGNED: tl.constexpr):
    """int32 [ROWS, LANES, 8] -> the pieces that hold them, LSB first, [ROWS, LANES, number of pieces].

    Signed codes are added up as they are: with 2**(BITS - 1) on each no field borrows from the next, and an exclusive
    or with the same number makes them two's complement.
    """
    PIECES: tl.constexpr = (BITS + 3) // 4
    PER: tl.constexpr = 8 // PIECES
    field = value.reshape(value.shape[0], value.shape[1], PIECES, PER)
    piece = tl.sum(field << (tl.arange(0, PER) * BITS)[None, None, None, :], axis=3)
    if SIGNED:
        HALVES: tl.constexpr = (
            _HALVES_2 if BITS == 2 else _HALVES_4 if BITS == 4 else _HALVES_8 if BITS == 8 else _HALVES_16
        )
        piece = (piece + HALVES) ^ HALVES
    return piece


@triton.jit
def store_pieces(codes, origin, octet, within, left, piece, BITS: tl.constexpr, WHOLE: tl.constexpr):
    """Stores what `pack` made, up to whole words, of which the part beyond the vector is the padding."""
    PIECES: tl.constexpr = (BITS + 3) // 4
    PER: tl.constexpr = 8 // PIECES
    WORD: tl.constexpr = 32 // BITS if BITS < 4 else 8  # elements in one word, or in one octet
    inside = within & (8 * octet < tl.cdiv(left, WORD) * WORD)
    at = PIECES * octet[:, :, None] + tl.arange(0, PIECES)[None, None, :]
    limit = tl.cdiv(left, PER) if BITS > 4 else tl.cdiv(left, WORD) * (WORD // 8)
    _store(codes + PIECES * origin, at, limit, inside, left, piece.to(codes.dtype.element_ty), WHOLE)


@triton.jit
def ones(octet, left):
    """For an octet of single bits: those of elements that exist, int32 [ROWS, LANES, 1]."""
    return ((1 << tl.minimum(tl.maximum(left - 8 * octet, 0), 8)) - 1)[:, :, None]


@triton.jit
def load_codes(codes, origin, octet, inside, left, BITS: tl.constexpr, WHOLE: tl.constexpr):
    """Codes as int32 [ROWS, LANES, 8], of which the low ``BITS`` bits count."""
    PIECES: tl.constexpr = (BITS + 3) // 4
    PER: tl.constexpr = 8 // PIECES
    at = PIECES * octet[:, :, None] + tl.arange(0, PIECES)[None, None, :]
    piece = _load(codes + PIECES * origin, at, tl.cdiv(left, PER), inside, left, WHOLE).to(tl.int32)
    field = piece[:, :, :, None] >> (tl.arange(0, PER) * BITS)[None, None, None, :]
    return field.reshape(inside.shape[0], inside.shape[1], 8)


# --- values and rows ---


@triton.jit
def only(value, octet, inside, left, WHOLE: tl.constexpr):
    """[ROWS, LANES, 8] with zeros where nothing is."""
    exists = inside[:, :, None]
    if not WHOLE:
        exists = exists & (8 * octet[:, :, None] + tl.arange(0, 8)[None, None, :] < left)
    return tl.where(exists, value, 0.0)


@triton.jit
def magnitude_bits(p):
    """Bit pattern of |p|: ordered like the magnitudes, with Inf and NaN from 0x7F800000 on."""
    return p.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def row_max(value):
    """[ROWS, LANES, 8] -> [ROWS]; first inside a thread."""
    return tl.max(tl.max(value, axis=2), axis=1)


@triton.jit
def row_sum(value):
    return tl.sum(tl.sum(value, axis=2), axis=1)


@triton.jit
def over(value, RANKS: tl.constexpr):
    """``value / RANKS``, correctly rounded: for a power of two its reciprocal is exact."""
    if RANKS & (RANKS - 1) == 0:
        return value * (1.0 / RANKS)
    return tl.div_rn(value, tl.zeros_like(value) + RANKS)


@triton.jit
def _moments(
    x, stride, r, alpha, numel, block, largest, magnitudes, squares, tiles,
    MEMORY: tl.constexpr, WHOLE: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    head, origin, left, octet, within = place(tiles, block, numel, ROWS, LANES)
    inside = within & (8 * octet < left)
    value = read_x(x, stride, origin, octet, inside, left, WHOLE)
    _, p = compensate(value, r, alpha, origin, octet, inside, left, MEMORY, WHOLE)
    wide = tl.abs(p).to(tl.float64)
    slot = (head + tl.arange(0, ROWS)) * tiles + tl.program_id(0) % tiles
    exists = present(block, left, ROWS)
    tl.store(largest + slot, row_max(magnitude_bits(p)), mask=exists)
    tl.store(magnitudes + slot, row_sum(wide), mask=exists)
    tl.store(squares + slot, row_sum(wide * wide), mask=exists)


def moments(x: torch.Tensor, memory: Memory | None, block: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Per block ``(bits of max |p| int32, sum |p| fp64, sum p**2 fp64)``, for blocks of any length."""
    numel, cut = x.numel(), Geometry(x.numel(), block)
    shape = blocks(numel, block), cut.tiles
    largest = torch.zeros(
        shape, dtype=torch.int32, device=x.device
    )  # tiles of the last block beyond its end write none
    magnitudes, squares = (torch.zeros(shape, dtype=torch.float64, device=x.device) for _ in range(2))
    r, _, alpha, _, _ = factors(x, memory)
    arguments = x, x.stride(0), r, alpha, numel, block, largest, magnitudes, squares
    cut.launch(_moments, x, *arguments, MEMORY=mode_of(memory))
    return largest.amax(1), magnitudes.sum(1), squares.sum(1)
