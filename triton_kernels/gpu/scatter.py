"""Triton kernel of the sparse decode; contract in ops/scatter.py."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

BLOCK = 1024


@triton.jit
def _scatter_kernel(indices, values, out, count, numel, weight, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    index = tl.load(indices + i, mask=i < count, other=-1).to(tl.int64)
    inside = (index >= 0) & (index < numel)
    value = tl.load(values + i, mask=i < count, other=0.0)
    old = tl.load(out + index, mask=inside, other=0.0)
    tl.store(out + index, old + weight * value, mask=inside)


def scatter_add(indices, values, out, weight):
    count = indices.numel()
    if count:
        arguments = indices.contiguous(), values.detach().contiguous(), out.detach(), count, out.numel(), float(weight)
        with torch.cuda.device_of(out):
            _scatter_kernel[(triton.cdiv(count, BLOCK),)](*arguments, BLOCK=BLOCK, enable_fp_fusion=False)
