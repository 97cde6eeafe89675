"""Triton's interpreter with every pointer checked against its tensor: an access outside of it is an error.

The interpreter computes with plain addresses. Here the type of a pointer, which arithmetic and broadcasting hand on,
knows the memory of the tensor that it came from.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from unittest import mock


class OutOfBounds(Exception):
    """A kernel read or wrote memory that is not the tensor's."""


@contextlib.contextmanager
def checked() -> Iterator[None]:
    """Inside, accesses of interpreted kernels stay in the tensors that they were given, or raise."""
    import triton.language as tl
    from triton.runtime import interpreter

    class Pointer(tl.pointer_type):
        """A pointer into ``tensor``."""

        def __init__(self, element_ty: tl.dtype, tensor) -> None:
            super().__init__(element_ty)
            spread = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
            self.first = tensor.data_ptr()
            self.end = self.first + (spread + 1) * tensor.element_size() if tensor.numel() else self.first

    def check(pointers, mask, what: str) -> None:
        kind = pointers.dtype
        if not isinstance(kind, Pointer):
            raise OutOfBounds(f"{what} by a pointer of no tensor")
        used = pointers.data[mask.data.astype(bool)].astype("int64")
        size = max(1, kind.element_ty.primitive_bitwidth // 8)
        if used.size and (used.min() < kind.first or used.max() + size > kind.end):
            raise OutOfBounds(
                f"{what} from byte {used.min() - kind.first} to {used.max() + size - kind.first} "
                f"of a tensor of {kind.end - kind.first} bytes"
            )

    convert = interpreter._implicit_cvt
    load, store = interpreter.InterpreterBuilder.create_masked_load, interpreter.InterpreterBuilder.create_masked_store

    def converted(arg):
        result = convert(arg)
        if hasattr(arg, "data_ptr"):
            result.handle.dtype = Pointer(result.handle.dtype.element_ty, arg)
        return result

    def checked_load(self, pointers, mask, *rest):
        check(pointers, mask, "a read")
        return load(self, pointers, mask, *rest)

    def checked_store(self, pointers, value, mask, *rest):
        check(pointers, mask, "a write")
        return store(self, pointers, value, mask, *rest)

    builder = interpreter.InterpreterBuilder
    with (
        mock.patch.object(interpreter, "_implicit_cvt", converted),
        mock.patch.object(builder, "create_masked_load", checked_load),
        mock.patch.object(builder, "create_masked_store", checked_store),
    ):
        yield
