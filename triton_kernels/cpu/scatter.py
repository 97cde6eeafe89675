"""Numba kernel of the sparse decode; contract in ops/scatter.py."""

from __future__ import annotations

import torch
from numba import float32

from ..reference.scatter import out_of_range
from ._arrays import floats, signed32, signed64
from ._jit import jit


def scatter_add(indices, values, out, weight):
    indices, values, count = indices.contiguous(), values.contiguous(), indices.numel()
    if not count:
        return
    add = _add_wide if indices.dtype == torch.int64 else _add_narrow
    low, high = add(indices.data_ptr(), values.data_ptr(), count, out.data_ptr(), out.numel(), float(weight))
    if low < 0 or high >= out.numel():
        raise out_of_range(int(low), int(high), out.numel())


@jit()
def _add_wide(indices, values, count, out, numel, weight):
    return _add(signed64(indices, count), floats(values, count), floats(out, numel), float32(weight))


@jit()
def _add_narrow(indices, values, count, out, numel, weight):
    return _add(signed32(indices, count), floats(values, count), floats(out, numel), float32(weight))


@jit()
def _add(indices, values, out, weight):
    """Lowest and highest index; adds unless one of them is out of range."""
    low = high = indices[0]
    for i in range(indices.size):
        low = indices[i] if indices[i] < low else low
        high = indices[i] if indices[i] > high else high
    if low >= 0 and high < out.size:
        for i in range(indices.size):
            out[indices[i]] += weight * values[i]
    return low, high
