"""Kernels of the tests: one that writes what gpu/_philox.py generates, and a copy; imported only once Triton may be."""

from __future__ import annotations

import triton
import triton.language as tl

from compression_plugins.triton_kernels.gpu._philox import KEY_ARGUMENTS, uniform16


@triton.jit(do_not_specialize=KEY_ARGUMENTS)
def uniform16_kernel(out, seed, tensor, first, step, rank, stream, COUNTERS: tl.constexpr):
    counter = tl.arange(0, COUNTERS).to(tl.int64)[None, :]
    h = uniform16(counter, seed, tensor, first, step, rank, stream)
    tl.store(out + tl.arange(0, 8 * COUNTERS), h.reshape(8 * COUNTERS))


@triton.jit
def copy_kernel(x, out, numel, COUNT: tl.constexpr):
    """One that is wrong where ``numel`` is more than there is."""
    i = tl.arange(0, COUNT)
    tl.store(out + i, tl.load(x + i, mask=i < numel), mask=i < numel)
