"""Fused compression kernels, three times each: PyTorch reference, Numba for CPU, Triton for CUDA.

    from compression_plugins import triton_kernels as K
    payload = K.sign_encode(gradient, block=512, residual=memory)
    K.sign_decode(payload, gradient.numel(), block=512, out=gradient)

Every function picks its implementation by the device of its first tensor (``dispatch.py``); the three agree bit for bit
wherever the arithmetic has no order. Importing this package imports nothing else: torch, Numba and Triton wait for the
first use of a name.

Common to all: gradients are 1-D tensors of fp32, fp16 or bf16 of any length and stride, arithmetic is fp32, and an
error-feedback memory is fused into every encoder (four numbers cover the published forms):

    p = x + alpha * r        q = decode(encode(p))        r <- decay * r + x - sent * q
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # the names below are made on first use; this is how editors and type checkers find them
    from . import layout
    from .philox import Key, uniform16
    from .reference.cast import cast_decode, cast_encode, cast_reduce
    from .reference.chunk import chunk_gather, chunk_select
    from .reference.fold import bit_merge, one_hot_signs, sign_bits, signs_expand
    from .reference.pack import pack_bits, unpack_bits
    from .reference.scatter import scatter_add
    from .reference.sign import sign_apply, sign_decode, sign_draw, sign_encode, sign_reduce, sign_vote
    from .reference.stats import stats
    from .reference.uniform import (
        uniform_apply,
        uniform_average,
        uniform_decode,
        uniform_encode,
        uniform_reduce,
        uniform_round,
    )

__all__ = [
    "Key",
    "bit_merge",
    "cast_decode",
    "cast_encode",
    "cast_reduce",
    "chunk_gather",
    "chunk_select",
    "layout",
    "one_hot_signs",
    "pack_bits",
    "scatter_add",
    "sign_apply",
    "sign_bits",
    "sign_decode",
    "sign_draw",
    "sign_encode",
    "sign_reduce",
    "sign_vote",
    "signs_expand",
    "stats",
    "uniform16",
    "uniform_apply",
    "uniform_average",
    "uniform_decode",
    "uniform_encode",
    "uniform_reduce",
    "uniform_round",
    "unpack_bits",
]


def __getattr__(name: str) -> Any:
    from importlib import import_module

    if name == "layout":
        value = import_module(".layout", __name__)
    elif name in ("Key", "uniform16"):
        value = getattr(import_module(".philox", __name__), name)
    else:
        dispatch = import_module(".dispatch", __name__)
        if name not in dispatch.FAMILY_OF:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = dispatch.dispatched(name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
