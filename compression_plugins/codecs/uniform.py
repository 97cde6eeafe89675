"""b-bit codes on a uniform grid, one fp32 scale per block."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from .. import triton_kernels as K
from .base import Codec, memory_arguments

if TYPE_CHECKING:
    from torch import Tensor

    from ..core.memory import Memory, Vector
    from ..triton_kernels import Key


@dataclass(frozen=True)
class Uniform(Codec):
    """x -> (scale / L) * round(L * x / scale) with L = 2^(bits-1) - 1 levels on each side of zero.

    Layout: `ceil(n/block)` fp32 scales, then two's complement codes of `bits` each, padded to whole 4-byte words.
    With stochastic rounding E[decode] = x and the error of an element is at most scale^2 / (4 L^2) in the mean square.
    """

    bits: Literal[2, 4, 8, 16] = 8
    block: int = 512
    scale: Literal["absmax", "l2"] = "absmax"
    rounding: Literal["stochastic", "nearest"] = "stochastic"

    def nbytes(self, numel: int) -> int:
        return K.layout.uniform_bytes(numel, self.bits, self.block)

    def scale_bytes(self, numel: int) -> int:
        return 4 * K.layout.blocks(numel, self.block)

    def encode(
        self,
        x: Tensor,
        key: Key,
        memory: Memory | None = None,
        residual: Vector | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        return K.uniform_encode(
            x, self.bits, self.block, key, self.scale, self.rounding, out=out, **memory_arguments(memory, residual)
        )

    def decode(
        self, payload: Tensor, numel: int, out: Tensor | None = None, weight: float = 1.0, accumulate: bool = False
    ) -> Tensor:
        return K.uniform_decode(payload, numel, self.bits, self.block, out=out, weight=weight, accumulate=accumulate)

    def merge(self, payloads: Tensor, numel: int, key: Key) -> Tensor:
        return K.uniform_reduce(payloads, numel, self.bits, self.block, key, self.scale, self.rounding)

    def average(self, payloads: Tensor, numel: int, out: Tensor) -> Tensor:
        return K.uniform_average(payloads, numel, self.bits, self.block, out=out) if numel else out
