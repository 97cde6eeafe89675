"""Triton kernels of bit packing; contracts in ops/pack.py."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..layout import words

BLOCK = 1024


@triton.jit
def _pack(codes, stride, out, numel, count, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """One lane a word; a word touches at most ``32 / WIDTH + 2`` codes, the first and last possibly in part."""
    w = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    first = 32 * w // WIDTH
    word = tl.zeros([BLOCK], tl.uint32)
    for k in tl.static_range((32 + WIDTH - 1) // WIDTH + 1):
        shift = ((first + k) * WIDTH - 32 * w).to(tl.int32)
        code = tl.load(codes + (first + k) * stride, mask=(first + k < numel) & (shift < 32), other=0)
        code = (code & ((1 << WIDTH) - 1)).to(tl.uint32)
        word |= tl.where(
            shift >= 0, code << tl.maximum(shift, 0).to(tl.uint32), code >> tl.maximum(-shift, 0).to(tl.uint32)
        )
    tl.store(out + w, word.to(tl.int32, bitcast=True), mask=w < count)


@triton.jit
def _unpack(packed, out, numel, count, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    w, shift = i * WIDTH // 32, i * WIDTH % 32
    low = tl.load(packed + w, mask=i < numel, other=0).to(tl.int64) & 0xFFFFFFFF
    high = tl.load(packed + w + 1, mask=(i < numel) & (w + 1 < count), other=0).to(tl.int64) & 0xFFFFFFFF
    code = ((low | (high << 32)) >> shift) & ((1 << WIDTH) - 1)
    tl.store(out + i, code.to(tl.int32), mask=i < numel)


def _launch(kernel, lanes, like, *arguments, width):
    if lanes:
        with torch.cuda.device_of(like):
            kernel[(triton.cdiv(lanes, BLOCK),)](*arguments, WIDTH=width, BLOCK=BLOCK, enable_fp_fusion=False)


def pack_bits(codes, width, out):
    count = words(codes.numel(), width)
    _launch(_pack, count, codes, codes, codes.stride(0), out.view(torch.int32), codes.numel(), count, width=width)


def unpack_bits(payload, numel, width, out):
    count = words(numel, width)
    _launch(_unpack, numel, payload, payload.view(torch.int32), out, numel, count, width=width)
