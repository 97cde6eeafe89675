"""Payload layouts and argument checks, shared by the three implementations.

A payload is one contiguous ``uint8`` tensor ``[scales fp32, one per block | codes]``, little-endian, bits LSB first;
the code area is padded with zero bits to whole 4-byte words. Its size follows from ``(numel, settings)`` alone:

    sign     4 * ceil(n / block) + 4 * ceil(n / 32)            bit 1 means p >= 0
    uniform  4 * ceil(n / block) + 4 * ceil(n * bits / 32)     two's complement codes of 2, 4, 8 or 16 bits
    cast     bf16, fp16: 4 * ceil(n / 2), no scales            fp8: 4 * ceil(n / block) + 4 * ceil(n / 4), e4m3
    packed   4 * ceil(n * width / 32), no scales

``block`` is a multiple of 32, so that every block starts on a word.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from ..errors import CompressionError

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
UNIFORM_BITS = (2, 4, 8, 16)
CAST_BITS = {"bf16": 16, "fp16": 16, "fp8": 8}
SCALES = ("absmax", "l2")
ROUNDINGS = ("stochastic", "nearest")
FP8_MAX = 448.0  # largest finite e4m3 value
SCALE_MAX = float.fromhex("0x1.ffffep+127")  # just under the fp32 maximum: levels * (scale / levels) stays finite


class Memory(NamedTuple):
    """Error-feedback memory of one call: the residual (or None) and its three factors."""

    residual: torch.Tensor | None = None
    alpha: float = 1.0
    decay: float = 1.0
    sent: float = 1.0


def words(numel: int, bits: int) -> int:
    """Number of 32-bit words that hold ``numel`` codes of ``bits`` bits."""
    return -(-numel * bits // 32)


def blocks(numel: int, block: int) -> int:
    """Number of blocks, the last one possibly short."""
    return -(-numel // block)


def sign_bytes(numel: int, block: int) -> int:
    return 4 * (blocks(numel, block) + words(numel, 1))


def single_block(numel: int) -> int:
    """The block length of a payload that has one scale for the whole vector."""
    return 32 * max(1, words(numel, 1))


def uniform_bytes(numel: int, bits: int, block: int) -> int:
    return 4 * (blocks(numel, block) + words(numel, bits))


def cast_bytes(numel: int, kind: str, block: int) -> int:
    return 4 * (cast_scales(numel, kind, block) + words(numel, CAST_BITS[kind]))


def cast_scales(numel: int, kind: str, block: int) -> int:
    """Number of scales in a cast payload: one a block for fp8, none for the 16-bit kinds."""
    return blocks(numel, block) if kind == "fp8" else 0


def uniform_levels(bits: int) -> int:
    """Largest code; codes are in [-levels, levels], the most negative two's complement value is never produced."""
    return 2 ** (bits - 1) - 1


# --- checks: each raises CompressionError naming the argument, what it was and what is expected ---


def check_block(block: int) -> None:
    if block < 32 or block % 32:
        raise CompressionError(f"block must be a positive multiple of 32, got {block}")


def check_bits(bits: int) -> None:
    if bits not in UNIFORM_BITS:
        raise CompressionError(f"bits must be one of {UNIFORM_BITS}, got {bits}")


def check_kind(kind: str) -> None:
    if kind not in CAST_BITS:
        raise CompressionError(f"kind must be one of {tuple(CAST_BITS)}, got {kind!r}")


def check_width(width: int) -> None:
    if not 1 <= width <= 16:
        raise CompressionError(f"width must be 1 to 16 bits, got {width}")


def check_uniform(bits: int, block: int, key: object, scale: str, rounding: str) -> None:
    check_bits(bits)
    check_block(block)
    if scale not in SCALES:
        raise CompressionError(f"scale must be one of {SCALES}, got {scale!r}")
    if rounding not in ROUNDINGS:
        raise CompressionError(f"rounding must be one of {ROUNDINGS}, got {rounding!r}")
    if rounding == "stochastic" and key is None:
        raise CompressionError("stochastic rounding needs a Philox key")


def check_round(x: torch.Tensor, bits: int, scale: float, out: torch.Tensor | None) -> torch.Tensor:
    """Where `uniform_round` writes."""
    check_bits(bits)
    check_vector(x)
    if x.dtype != torch.float32 or not x.is_contiguous():
        raise CompressionError(f"x must be contiguous fp32, not {x.dtype} with stride {x.stride(0)}")
    if not 0 <= scale <= SCALE_MAX:
        raise CompressionError(f"scale must be from 0 to {SCALE_MAX:g}, not {scale}")
    if out is None:
        return torch.empty_like(x)
    check_buffer(out, x, x.numel(), "out")
    return out


def check_vector(x: torch.Tensor, name: str = "x") -> None:
    if x.dim() != 1 or x.dtype not in FLOATS:
        raise CompressionError(f"{name} must be 1-D fp32, fp16 or bf16, got {x.dtype} of shape {tuple(x.shape)}")


def check_codes(codes: torch.Tensor) -> None:
    if codes.dim() != 1 or codes.dtype != torch.int32:
        raise CompressionError(f"codes must be 1-D int32, got {codes.dtype} of shape {tuple(codes.shape)}")


def check_buffer(buffer: torch.Tensor, like: torch.Tensor, numel: int, name: str) -> None:
    """``buffer`` is updated in place: fp32, contiguous, 1-D, ``numel`` long and on the device of ``like``."""
    if buffer.dtype != torch.float32 or buffer.shape != (numel,) or not buffer.is_contiguous():
        raise CompressionError(
            f"{name} must be a contiguous 1-D fp32 tensor of {numel} elements, "
            f"got {buffer.dtype} of shape {tuple(buffer.shape)} and stride {buffer.stride()}"
        )
    if buffer.device != like.device:
        raise CompressionError(f"{name} is on {buffer.device}, the input on {like.device}")


def check_residual(memory: Memory, like: torch.Tensor, numel: int) -> None:
    if memory.residual is not None:
        check_buffer(memory.residual, like, numel, "residual")


def check_input(x: torch.Tensor, memory: Memory) -> None:
    check_vector(x)
    check_residual(memory, x, x.numel())


def check_apply(payload: torch.Tensor, param: torch.Tensor, momentum_buffer: torch.Tensor | None) -> None:
    check_buffer(param, payload, param.numel(), "param")
    if momentum_buffer is not None:
        check_buffer(momentum_buffer, payload, param.numel(), "momentum_buffer")


def check_payload(payload: torch.Tensor, size: int) -> None:
    if payload.dtype != torch.uint8 or payload.shape != (size,) or not payload.is_contiguous():
        raise CompressionError(
            f"payload must be a contiguous uint8 tensor of {size} bytes, "
            f"got {payload.dtype} of shape {tuple(payload.shape)} and stride {payload.stride()}"
        )
    if size and (payload.storage_offset() % 4 or payload.data_ptr() % 4):
        raise CompressionError("payload must start on a 4-byte boundary")


def check_payloads(payloads: torch.Tensor, size: int) -> None:
    """``payloads``: uint8 [ranks, size], contiguous, at least one rank."""
    if payloads.dim() != 2 or not payloads.shape[0]:
        raise CompressionError(f"payloads must have shape [ranks, {size}], got {tuple(payloads.shape)}")
    if payloads.shape[1] != size or not payloads.is_contiguous():
        raise CompressionError(
            f"payloads must be contiguous with {size} bytes a rank, "
            f"got shape {tuple(payloads.shape)} and stride {payloads.stride()}"
        )
    check_payload(payloads.view(-1), payloads.numel())


# --- views ---


def payload_for(out: torch.Tensor | None, size: int, like: torch.Tensor) -> torch.Tensor:
    """``out`` after its checks, or a new payload of ``size`` bytes beside ``like``. Every byte will be written."""
    if out is None:
        return torch.empty(size, dtype=torch.uint8, device=like.device)
    check_payload(out, size)
    if out.device != like.device:
        raise CompressionError(f"out is on {out.device}, the input on {like.device}")
    return out


def result_for(out: torch.Tensor | None, numel: int, like: torch.Tensor, accumulate: bool) -> torch.Tensor:
    """``out`` after its checks, or a new fp32 vector of ``numel`` elements beside ``like``."""
    if out is None:
        if accumulate:
            raise CompressionError("accumulate=True needs out=")
        return torch.empty(numel, dtype=torch.float32, device=like.device)
    check_buffer(out, like, numel, "out")
    return out


def split(payload: torch.Tensor, scales: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Views ``(scales fp32, code words int32)`` of a payload [bytes] or of payloads [ranks, bytes]."""
    if not payload.numel():  # rows of an empty [ranks, 0] tensor start at odd offsets, which `view` refuses
        payload = torch.empty_like(payload)
    words32 = payload.view(-1).view(torch.int32).view(*payload.shape[:-1], payload.shape[-1] // 4)
    return words32[..., :scales].view(torch.float32), words32[..., scales:]
