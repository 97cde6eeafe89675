"""Fused compression kernels, three times each: PyTorch reference, Numba for CPU, Triton for CUDA.

    from compression_plugins import triton_kernels as K
    payload = K.sign_encode(gradient, block=512, residual=memory)
    K.sign_decode(payload, gradient.numel(), block=512, out=gradient)

``ops/`` holds each function once: its contract, its checks and its outputs. The arithmetic is a body of the same name
in ``reference/``, ``cpu/`` and ``gpu/``, chosen by the device of the first tensor (``dispatch.py``); the three agree
bit for bit wherever the arithmetic has no order. Importing this package imports nothing else: torch, Numba and Triton
wait for the first use of a name.

Common to all: gradients are 1-D tensors of fp32, fp16 or bf16 of any length and stride, arithmetic is fp32, and an
error-feedback memory is fused into every encoder (four numbers cover the published forms):

    p = x + alpha * r        q = decode(encode(p))        r <- decay * r + x - sent * q

The new memory replaces ``residual``, or goes to ``updated``, which is fp32 like it; then ``residual`` is only read, so
that a step can be thrown away, and every element of ``updated`` is written. The two may be one tensor, but may not
overlap in part. Every function raises ``CompressionError``, in one sentence, for an argument that it cannot work on.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # names are made on first use; this is how editors and type checkers find them
    from . import layout as layout
    from .ops.cast import *  # noqa: F403
    from .ops.chunk import *  # noqa: F403
    from .ops.fold import *  # noqa: F403
    from .ops.pack import *  # noqa: F403
    from .ops.scatter import *  # noqa: F403
    from .ops.sign import *  # noqa: F403
    from .ops.stats import *  # noqa: F403
    from .ops.uniform import *  # noqa: F403
    from .philox import Key as Key
    from .philox import uniform16 as uniform16

_OTHERS = ("Key", "layout", "uniform16")


def __getattr__(name: str) -> Any:
    from importlib import import_module

    if name == "__all__":
        return __dir__()
    if name == "layout":
        value: Any = import_module(".layout", __name__)
    elif name in ("Key", "uniform16"):
        value = getattr(import_module(".philox", __name__), name)
    elif name.startswith("_"):  # Python asks for several such names, of which none is worth importing torch
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    else:
        ops = import_module(".ops", __name__)
        if name not in ops.FUNCTIONS:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = ops.FUNCTIONS[name]
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    from .ops import FUNCTIONS

    return sorted([*FUNCTIONS, *_OTHERS])
