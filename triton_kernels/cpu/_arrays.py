"""Arrays at the addresses of tensors: a NumPy view of a tensor costs microseconds per call, its address does not.

The fronts have checked that the memory is there, contiguous, and as long as it must be; the body that passes an address
keeps the tensor alive. A kernel with an inner function takes its arrays as arguments from the kernel that makes them:
inlining the inner function, Numba deletes a last assignment to an array that is no argument.
"""

from __future__ import annotations

import numpy as np
from numba import carray, types
from numba.core import cgutils
from numba.extending import intrinsic

from ._jit import jit


@intrinsic
def _pointer(typing_context, address):
    def codegen(context, builder, signature, arguments):
        return builder.inttoptr(arguments[0], cgutils.voidptr_t)

    return types.voidptr(types.int64), codegen


@jit()
def floats(address, count):
    return carray(_pointer(address), (count,), np.float32)


@jit()
def unsigned32(address, count):
    return carray(_pointer(address), (count,), np.uint32)


@jit()
def signed32(address, count):
    return carray(_pointer(address), (count,), np.int32)


@jit()
def signed64(address, count):
    return carray(_pointer(address), (count,), np.int64)


@jit()
def unsigned16(address, count):
    return carray(_pointer(address), (count,), np.uint16)


@jit()
def unsigned8(address, count):
    return carray(_pointer(address), (count,), np.uint8)
