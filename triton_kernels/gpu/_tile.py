"""What the GPU kernels share: the cutting of a vector into [rows, columns] tiles, and the memory of an encoder.

A tile is several whole blocks (rows) when blocks are short, one block when they are long, and a piece of one block when
they exceed ``MAX_COLUMNS``; then block scales come from a first pass over the input, `moments`.
Lanes outside the vector or the block are masked and never enter a scale, a code or a memory.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl

from ..layout import Memory, blocks
from ..reference._memory import divide

MAX_COLUMNS = 4096
ELEMENTS = 2048  # of a tile of short blocks


class Geometry:
    """How ``numel`` elements in blocks of ``block`` are cut: tiles of ``rows`` x ``columns``, ``tiles`` a block."""

    def __init__(self, numel: int, block: int):
        span = min(block, max(32, numel))  # one block longer than the vector needs no more tiles than the vector
        self.columns = min(triton.next_power_of_2(span), MAX_COLUMNS)
        self.rows = max(1, ELEMENTS // self.columns)
        self.tiles = triton.cdiv(span, self.columns)
        self.programs = triton.cdiv(blocks(numel, block), self.rows) * self.tiles
        self.long = self.tiles > 1

    def launch(self, kernel, like: torch.Tensor, *arguments, **constants) -> None:
        """Runs ``kernel(*arguments, tiles, ROWS=, COLUMNS=, **constants)``; no FMA, to keep the bits of the CPU."""
        if not self.programs:
            return
        warps = 8 if self.columns == MAX_COLUMNS else 4
        with torch.cuda.device_of(like):
            kernel[(self.programs,)](
                *arguments,
                self.tiles,
                ROWS=self.rows,
                COLUMNS=self.columns,
                num_warps=warps,
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


@triton.jit
def place(tiles, block, numel, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Rows (block numbers) [ROWS], columns [COLUMNS], element index [ROWS, COLUMNS] and which lanes exist."""
    program = tl.program_id(0)
    row = (program // tiles).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = (program % tiles) * COLUMNS + tl.arange(0, COLUMNS)
    index = row[:, None] * block + column[None, :]
    return row, column, index, (column[None, :] < block) & (index < numel)


@triton.jit
def load_x(x, stride, index, inside):
    """x in fp32, zero in masked lanes."""
    value = tl.load(x + index * stride, mask=inside, other=0.0)
    if x.dtype.element_ty == tl.bfloat16:  # by its bits: Triton's interpreter loses subnormals
        return (value.to(tl.int16, bitcast=True).to(tl.int32) << 16).to(tl.float32, bitcast=True)
    return value.to(tl.float32)


@triton.jit
def compensate(value, r, alpha, index, inside, MEMORY: tl.constexpr):
    """``(r, p = x + alpha * r)``, zero in masked lanes; without memory both are x."""
    old, p = value, value
    if MEMORY:
        old = tl.load(r + index, mask=inside, other=0.0)
        p = value + alpha * old
    return old, p


@triton.jit
def remember(updated, index, inside, finite, value, old, q, decay, sent, MEMORY: tl.constexpr):
    """The new memory is ``decay * r + x - sent * q`` where ``finite`` holds, per element, and r elsewhere."""
    new = (decay * old + value) - sent * q
    if MEMORY == 2:
        tl.store(updated + index, tl.where(finite, new, old), mask=inside)
    else:
        tl.store(updated + index, new, mask=inside & finite)


@triton.jit
def write(out, index, inside, value, weight, ACCUMULATE: tl.constexpr):
    """``out = weight * value`` or ``out += weight * value``."""
    result = weight * value
    if ACCUMULATE:
        result = tl.load(out + index, mask=inside, other=0.0) + result
    tl.store(out + index, result, mask=inside)


@triton.jit
def store_codes(words, row, column, block, numel, codes, BITS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Packs int32 codes [ROWS, COLUMNS] of ``BITS`` bits (zero in masked lanes), LSB first, into int32 words."""
    PER: tl.constexpr = 32 // BITS
    shift = tl.arange(0, PER) * BITS
    field = (codes & ((1 << BITS) - 1)).reshape(ROWS, COLUMNS // PER, PER) << shift[None, None, :]
    word_column = tl.arange(0, COLUMNS // PER) + tl.min(column, axis=0) // PER
    index = row[:, None] * (block // PER) + word_column[None, :]
    exists = (word_column[None, :] < block // PER) & (index * PER < numel)
    tl.store(words + index, tl.sum(field, axis=2), mask=exists)


@triton.jit
def load_codes(words, index, inside, BITS: tl.constexpr):
    """Unsigned codes of ``BITS`` bits at element ``index`` as int32."""
    PER: tl.constexpr = 32 // BITS
    word = tl.load(words + index // PER, mask=inside, other=0)
    return (word >> ((index % PER) * BITS).to(tl.int32)) & ((1 << BITS) - 1)


@triton.jit
def magnitude_bits(p):
    """Bit pattern of |p|: ordered like the magnitudes, with Inf and NaN from 0x7F800000 on."""
    return p.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def _moments(
    x, stride, r, alpha, numel, block, largest, magnitudes, squares, tiles,
    MEMORY: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row, column, index, inside = place(tiles, block, numel, ROWS, COLUMNS)
    _, p = compensate(load_x(x, stride, index, inside), r, alpha, index, inside, MEMORY)
    wide = tl.abs(p).to(tl.float64)
    slot = row * tiles + tl.program_id(0) % tiles
    exists = row * block < numel
    tl.store(largest + slot, tl.max(magnitude_bits(p), axis=1), mask=exists)
    tl.store(magnitudes + slot, tl.sum(wide, axis=1), mask=exists)
    tl.store(squares + slot, tl.sum(wide * wide, axis=1), mask=exists)


def moments(x: torch.Tensor, memory: Memory | None, block: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Per block ``(bits of max |p| int32, sum |p| fp64, sum p**2 fp64)``, for blocks of any length."""
    numel, cut = x.numel(), Geometry(x.numel(), block)
    shape = blocks(numel, block), cut.tiles
    largest = torch.empty(shape, dtype=torch.int32, device=x.device)
    magnitudes, squares = (torch.empty(shape, dtype=torch.float64, device=x.device) for _ in range(2))
    r, _, alpha, _, _ = factors(x, memory)
    arguments = x, x.stride(0), r, alpha, numel, block, largest, magnitudes, squares
    cut.launch(_moments, x, *arguments, MEMORY=mode_of(memory))
    return largest.amax(1), magnitudes.sum(1), squares.sum(1)
