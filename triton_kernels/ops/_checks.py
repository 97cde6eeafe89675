"""Argument checks and outputs of the fronts: each raises CompressionError with the argument, its value and the rule.

The CPU kernels work on bare addresses, so what is not refused here is read and written as it is.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...errors import CompressionError
from .. import layout
from ..layout import FLOATS, NUMEL_MAX, SPAN_MAX, Memory, numel_of

# --- settings ---


def block_of(block: int, numel: int) -> int:
    """The block to compute with: one longer than the vector is cut to it, which changes no byte."""
    if block < 32 or block % 32:
        raise CompressionError(f"block must be a positive multiple of 32, got {block}")
    if block > SPAN_MAX:
        raise CompressionError(f"block must be at most {SPAN_MAX} (2**31 - 4096), got {block}")
    return block if block <= numel else min(block, layout.single_block(numel))


def chunk_of(chunk: int, numel: int) -> int:
    """The chunk to compute with, cut like a block."""
    if not 1 <= chunk <= SPAN_MAX:
        raise CompressionError(f"chunk must be at least 1 and at most {SPAN_MAX} (2**31 - 4096) elements, got {chunk}")
    return min(chunk, max(1, numel))


def bits_of_code(bits: int) -> None:
    if bits not in layout.UNIFORM_BITS:
        raise CompressionError(f"bits must be one of {layout.UNIFORM_BITS}, got {bits}")


def kind_of_cast(kind: str) -> None:
    if kind not in layout.CAST_BITS:
        raise CompressionError(f"kind must be one of {tuple(layout.CAST_BITS)}, got {kind!r}")


def width_of(width: int) -> None:
    if not 1 <= width <= 16:
        raise CompressionError(f"width must be 1 to 16 bits, got {width}")


def rounding_of(key: object, scale: str, rounding: str) -> None:
    if scale not in layout.SCALES:
        raise CompressionError(f"scale must be one of {layout.SCALES}, got {scale!r}")
    if rounding not in layout.ROUNDINGS:
        raise CompressionError(f"rounding must be one of {layout.ROUNDINGS}, got {rounding!r}")
    if rounding == "stochastic" and key is None:
        raise CompressionError("stochastic rounding needs a Philox key")


def share(a: int, b: int) -> None:
    if a < 1 or b < 1:
        raise CompressionError(f"bit_merge counts the ranks behind each side, at least one each, got a={a} and b={b}")


def rank_of(rank: int, size: int) -> None:
    if not 1 <= size <= layout.DRAWS or not 0 <= rank < size:
        raise CompressionError(
            f"rank must be in [0, size) and size in [1, {layout.DRAWS}], got rank={rank} and size={size}"
        )


# --- inputs ---


def vector(x: Tensor) -> int:
    """Number of elements of ``x``: 1-D, of a dtype that the kernels read, any stride."""
    if x.ndim != 1 or x.dtype not in FLOATS:
        raise CompressionError(f"x must be 1-D fp32, fp16 or bf16, got {x.dtype} of shape {tuple(x.shape)}")
    if x.is_neg():  # its memory holds the opposite of its values
        raise CompressionError("x is a lazily negated view: pass x.resolve_neg()")
    numel = x.numel()
    if numel > NUMEL_MAX:
        raise CompressionError(f"x must have at most {NUMEL_MAX} (2**40) elements, got {numel}")
    return numel


def buffer(buffer: Tensor, like: Tensor, numel: int, name: str) -> None:
    """``buffer`` is written in place: fp32, contiguous, 1-D, ``numel`` long and on the device of ``like``."""
    if buffer.dtype != torch.float32 or buffer.ndim != 1 or buffer.numel() != numel or not buffer.is_contiguous():
        raise CompressionError(
            f"{name} must be a contiguous 1-D fp32 tensor of {numel} elements, "
            f"got {buffer.dtype} of shape {tuple(buffer.shape)} and stride {buffer.stride()}"
        )
    if buffer.device != like.device:
        raise CompressionError(f"{name} is on {buffer.device}, the input on {like.device}")


def parts(etas: Tensor, count: int, like: Tensor) -> None:
    """``etas``: one number for each of ``count`` parts, on the device of ``like``."""
    buffer(etas, like, count, "etas")


def memory(
    like: Tensor,
    numel: int,
    residual: Tensor | None,
    updated: Tensor | None,
    alpha: float = 1.0,
    decay: float = 1.0,
    sent: float = 1.0,
) -> Memory | None:
    """The memory of one call, None for none."""
    if residual is None:
        if updated is not None:
            raise CompressionError("updated= needs residual=, the memory that it is computed from")
        return None
    buffer(residual, like, numel, "residual")
    if updated is None:
        return Memory(residual, residual, alpha, decay, sent)
    buffer(updated, like, numel, "updated")
    distance = abs(updated.data_ptr() - residual.data_ptr())
    if not distance:
        return Memory(residual, residual, alpha, decay, sent)
    if distance < 4 * numel:
        raise CompressionError(
            f"updated must be residual itself or not overlap it, got two tensors that start {distance} bytes apart"
        )
    return Memory(residual, updated, alpha, decay, sent)


def payload(payload: Tensor, size: int, name: str = "payload") -> None:
    if payload.dtype != torch.uint8 or payload.ndim != 1 or payload.numel() != size or not payload.is_contiguous():
        raise CompressionError(
            f"{name} must be a contiguous uint8 tensor of {size} bytes, "
            f"got {payload.dtype} of shape {tuple(payload.shape)} and stride {payload.stride()}"
        )
    if size and payload.data_ptr() % 4:
        raise CompressionError(f"{name} must start on a 4-byte boundary")


def payloads(payloads: Tensor, size: int) -> None:
    """``payloads``: uint8 [ranks, size], contiguous, at least one rank."""
    if payloads.ndim != 2 or not payloads.shape[0]:
        raise CompressionError(f"payloads must have shape [ranks, {size}], got {tuple(payloads.shape)}")
    if payloads.shape[1] != size or not payloads.is_contiguous():
        raise CompressionError(
            f"payloads must be contiguous with {size} bytes per rank, "
            f"got shape {tuple(payloads.shape)} and stride {payloads.stride()}"
        )
    payload(payloads.view(-1), payloads.numel(), "payloads")


def codes(codes: Tensor) -> int:
    """Number of codes."""
    if codes.ndim != 1 or codes.dtype != torch.int32:
        raise CompressionError(f"codes must be 1-D int32, got {codes.dtype} of shape {tuple(codes.shape)}")
    numel = codes.numel()
    numel_of(numel)
    return numel


def indices(indices: Tensor, chunks: int, like: Tensor) -> None:
    """One int32 offset per chunk, on the device of ``like``."""
    if indices.dtype != torch.int32 or indices.shape != (chunks,):
        raise CompressionError(
            f"indices must be int32 of shape ({chunks},), one per chunk, "
            f"got {indices.dtype} of shape {tuple(indices.shape)}"
        )
    if indices.device != like.device:
        raise CompressionError(f"indices are on {indices.device}, the input on {like.device}")


def bit_pair(left: Tensor, right: Tensor) -> None:
    """Two packed bit vectors of one length, a whole number of 4-byte words, on one device."""
    for name, bits in (("left", left), ("right", right)):
        payload(bits, left.numel(), name)
    if left.numel() % 4:
        raise CompressionError(f"packed bits come in whole 4-byte words, got {left.numel()} bytes")
    if left.device != right.device:
        raise CompressionError(f"left is on {left.device}, right on {right.device}")


def sparse(indices: Tensor, values: Tensor, out: Tensor) -> None:
    if indices.dtype not in (torch.int32, torch.int64) or indices.ndim != 1:
        raise CompressionError(
            f"indices must be 1-D int32 or int64, got {indices.dtype} of shape {tuple(indices.shape)}"
        )
    if values.dtype != torch.float32 or values.shape != indices.shape:
        raise CompressionError(
            f"values must be fp32 of shape {tuple(indices.shape)}, got {values.dtype} of shape {tuple(values.shape)}"
        )
    if values.device != indices.device:
        raise CompressionError(f"values are on {values.device}, the indices on {indices.device}")
    buffer(out, indices, out.numel(), "out")


# --- outputs ---


def payload_out(out: Tensor | None, size: int, like: Tensor) -> Tensor:
    """``out`` after its checks, or a new payload of ``size`` bytes beside ``like``. Every byte will be written."""
    if out is None:
        return torch.empty(size, dtype=torch.uint8, device=like.device)
    payload(out, size, "out")
    if out.device != like.device:
        raise CompressionError(f"out is on {out.device}, the input on {like.device}")
    return out


def result_out(out: Tensor | None, numel: int, like: Tensor, accumulate: bool = False) -> Tensor:
    """``out`` after its checks, or a new fp32 vector of ``numel`` elements beside ``like``."""
    if out is None:
        if accumulate:
            raise CompressionError("accumulate=True needs out=")
        return torch.empty(numel, dtype=torch.float32, device=like.device)
    buffer(out, like, numel, "out")
    return out
