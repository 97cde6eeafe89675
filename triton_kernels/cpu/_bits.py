"""LLVM intrinsics that Numba's own loops do not reach: thirty-two sign bits at a time, and the bits of a float.

The first two are plain LLVM vector code (a comparison, a select, and the bit cast between ``<32 x i1>`` and ``i32``),
so they compile on every CPU; on x86 they become a few compare, pack and movemask instructions. Memory is not
bounds-checked. The other two are bit casts of scalars, which keep a conversion in one loop that LLVM vectorises.
"""

from __future__ import annotations

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

_LANES = ir.VectorType(ir.FloatType(), 32)


def _lanes_at(context, builder, array_type, array, index):
    """Pointer to the 32 floats from ``array[index]`` on."""
    data = context.make_array(array_type)(context, builder, array).data
    return builder.bitcast(cgutils.gep_inbounds(builder, data, index), _LANES.as_pointer())


def _splat(builder, value):
    lanes = ir.Constant(_LANES, ir.Undefined)
    lanes = builder.insert_element(lanes, value, ir.Constant(ir.IntType(32), 0))
    return builder.shuffle_vector(lanes, lanes, ir.Constant(ir.VectorType(ir.IntType(32), 32), [0] * 32))


@intrinsic
def sign_mask(typing_context, values, index):
    """``sign_mask(values: float32[:], index) -> uint32``: bit k is ``values[index + k] >= 0``; false for NaN."""

    def codegen(context, builder, signature, arguments):
        pointer = _lanes_at(context, builder, signature.args[0], *arguments)
        positive = builder.fcmp_ordered(">=", builder.load(pointer, align=4), ir.Constant(_LANES, [0.0] * 32))
        return builder.bitcast(positive, ir.IntType(32))

    return types.uint32(values, types.uintp), codegen


@intrinsic
def spread_mask(typing_context, mask, one, zero, out, index):
    """``spread_mask(mask: uint32, one, zero, out: float32[:], index)``: ``out[index + k] = one if bit k else zero``."""

    def codegen(context, builder, signature, arguments):
        mask, one, zero, out, index = arguments
        pointer = _lanes_at(context, builder, signature.args[3], out, index)
        bits = builder.bitcast(mask, ir.VectorType(ir.IntType(1), 32))
        builder.store(builder.select(bits, _splat(builder, one), _splat(builder, zero)), pointer, align=4)
        return context.get_dummy_value()

    return types.void(types.uint32, types.float32, types.float32, out, types.uintp), codegen


@intrinsic
def as_float(typing_context, bits):
    """``as_float(bits: int32) -> float32``"""

    def codegen(context, builder, signature, arguments):
        return builder.bitcast(arguments[0], ir.FloatType())

    return types.float32(types.int32), codegen


@intrinsic
def as_bits(typing_context, value):
    """``as_bits(value: float32) -> int32``"""

    def codegen(context, builder, signature, arguments):
        return builder.bitcast(arguments[0], ir.IntType(32))

    return types.int32(types.float32), codegen
