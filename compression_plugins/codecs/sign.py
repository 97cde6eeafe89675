"""One bit per element and one fp32 scale per block."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from .. import triton_kernels as K
from .base import Codec, memory_arguments

if TYPE_CHECKING:
    from torch import Tensor

    from ..core.memory import Memory, Vector
    from ..triton_kernels import Key


@dataclass(frozen=True)
class Sign(Codec):
    """x -> mean|x| * sign(x) per block; sign(0) = +1.

    Layout: `ceil(n/block)` fp32 scales, then the sign bits (1 means >= 0) padded to whole 4-byte words.
    Contraction: delta = ||x||_1^2 / (n ||x||_2^2) per block, between 1/n and 1.
    """

    block: int = 1024

    def nbytes(self, numel: int) -> int:
        return K.layout.sign_bytes(numel, self.block)

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
        return K.sign_encode(x, self.block, out=out, **memory_arguments(memory, residual))

    def decode(
        self, payload: Tensor, numel: int, out: Tensor | None = None, weight: float = 1.0, accumulate: bool = False
    ) -> Tensor:
        return K.sign_decode(payload, numel, self.block, out=out, weight=weight, accumulate=accumulate)

    def merge(self, payloads: Tensor, numel: int, key: Key) -> Tensor:
        return K.sign_reduce(payloads, numel, self.block)
