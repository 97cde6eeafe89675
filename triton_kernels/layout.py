"""Payload layouts and the numbers that the three implementations share.

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
DRAWS = 65536  # a draw h is one of 0..65535
NUMEL_MAX = 2**40  # elements per vector: numbers of bits, of bytes and of programs of a launch stay far from overflow
SPAN_MAX = 2**31 - 4096  # elements per block or chunk: an offset inside one, and a tile after it, is an int32


class Memory(NamedTuple):
    """Error-feedback memory of one call: what is read, what is written, and its three factors.

    ``updated`` is ``residual`` itself where the memory is updated in place; else the two do not overlap, and every
    element of ``updated`` is written, with the old value where the memory keeps it.
    """

    residual: torch.Tensor
    updated: torch.Tensor
    alpha: float = 1.0
    decay: float = 1.0
    sent: float = 1.0

    @property
    def apart(self) -> bool:
        return self.updated is not self.residual


def numel_of(numel: int) -> None:
    """Refuses a number of elements that no vector has."""
    if not 0 <= numel <= NUMEL_MAX:
        raise CompressionError(f"numel must be from 0 to {NUMEL_MAX} (2**40), got {numel}")


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
    """Number of scales in a cast payload: one per block for fp8, none for the 16-bit kinds."""
    return blocks(numel, block) if kind == "fp8" else 0


def uniform_levels(bits: int) -> int:
    """Largest code; codes are in [-levels, levels], the most negative two's complement value is never produced."""
    return 2 ** (bits - 1) - 1


def keep_left_below(a: int, b: int) -> int:
    """Draws ``h`` below this keep the left bit: as many of the 65536 as have (h + 1/2) / 65536 < a / (a + b)."""
    return -(-(2 * DRAWS * a - (a + b)) // (2 * (a + b)))


def draws_of(rank: int, size: int) -> tuple[int, int]:
    """The half-open interval of draws ``h`` with ``(h * size) >> 16 == rank``; those of all ranks tile [0, 65536)."""
    return -(-rank * DRAWS // size), -(-(rank + 1) * DRAWS // size)


def split(payload: torch.Tensor, scales: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Views ``(scales fp32, code words int32)`` of a payload [bytes] or of payloads [ranks, bytes]."""
    if not payload.numel():  # rows of an empty [ranks, 0] tensor start at odd offsets, which `view` refuses
        payload = payload.new_empty(payload.shape)
    words32 = payload.view(-1).view(torch.int32).view(*payload.shape[:-1], payload.shape[-1] // 4)
    return words32[..., :scales].view(torch.float32), words32[..., scales:]
