"""Argument checks and integer thresholds shared by the three implementations of chunk, fold and scatter."""

from __future__ import annotations

import torch

from ..errors import CompressionError
from . import layout

DRAWS = 65536  # a draw h is one of 0..65535


def check_chunk(chunk: int) -> None:
    if chunk < 1:
        raise CompressionError(f"chunk must be at least 1 element, got {chunk}")


def check_indices(indices: torch.Tensor, chunks: int, like: torch.Tensor) -> None:
    """One int32 offset a chunk, on the device of ``like``."""
    if indices.dtype != torch.int32 or indices.shape != (chunks,):
        raise CompressionError(
            f"indices must be int32 of shape ({chunks},), one a chunk, "
            f"got {indices.dtype} of shape {tuple(indices.shape)}"
        )
    if indices.device != like.device:
        raise CompressionError(f"indices are on {indices.device}, the input on {like.device}")


def check_residual(x: torch.Tensor, residual: torch.Tensor | None) -> None:
    layout.check_input(x, layout.Memory(residual))


def check_bit_pair(left: torch.Tensor, right: torch.Tensor) -> None:
    """Two packed bit vectors of one length, a whole number of 4-byte words, on one device."""
    for payload in (left, right):
        layout.check_payload(payload, left.numel())
    if left.numel() % 4:
        raise CompressionError(f"packed bits come in whole 4-byte words, got {left.numel()} bytes")
    if left.device != right.device:
        raise CompressionError(f"left is on {left.device}, right on {right.device}")


def check_scatter(indices: torch.Tensor, values: torch.Tensor, out: torch.Tensor) -> None:
    if indices.dtype not in (torch.int32, torch.int64) or indices.dim() != 1:
        raise CompressionError(
            f"indices must be 1-D int32 or int64, got {indices.dtype} of shape {tuple(indices.shape)}"
        )
    if values.dtype != torch.float32 or values.shape != indices.shape:
        raise CompressionError(
            f"values must be fp32 of shape {tuple(indices.shape)}, got {values.dtype} of shape {tuple(values.shape)}"
        )
    if values.device != indices.device:
        raise CompressionError(f"values are on {values.device}, the indices on {indices.device}")
    layout.check_buffer(out, indices, out.numel(), "out")


def out_of_range(low: int, high: int, numel: int) -> CompressionError:
    return CompressionError(f"indices must be in [0, {numel}), got values from {low} to {high}")


def keep_left_below(a: int, b: int) -> int:
    """Draws ``h`` below this keep the left bit: as many of the 65536 as have (h + 1/2) / 65536 < a / (a + b)."""
    if a < 1 or b < 1:
        raise CompressionError(f"bit_merge counts the ranks behind each side, at least one each, got a={a} and b={b}")
    return -(-(2 * DRAWS * a - (a + b)) // (2 * (a + b)))


def draws_of(rank: int, size: int) -> tuple[int, int]:
    """The half-open interval of draws ``h`` with ``(h * size) >> 16 == rank``; those of all ranks tile [0, 65536)."""
    if not 1 <= size <= DRAWS or not 0 <= rank < size:
        raise CompressionError(f"rank must be in [0, size) and size in [1, {DRAWS}], got rank={rank} and size={size}")
    return -(-rank * DRAWS // size), -(-(rank + 1) * DRAWS // size)
