"""Narrower floating-point formats, rounded to nearest even."""

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
class Cast(Codec):
    """bf16 and fp16: the bare values, 2 bytes each. fp8: e4m3 codes under one fp32 scale (absmax / 448) per block.

    Layout: scales (fp8 only), then the codes padded to whole 4-byte words.
    """

    kind: Literal["bf16", "fp16", "fp8"]
    block: int = 256

    def nbytes(self, numel: int) -> int:
        return K.layout.cast_bytes(numel, self.kind, self.block)

    def scale_bytes(self, numel: int) -> int:
        return 4 * K.layout.cast_scales(numel, self.kind, self.block)

    def encode(
        self,
        x: Tensor,
        key: Key,
        memory: Memory | None = None,
        residual: Vector | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        return K.cast_encode(x, self.kind, self.block, out=out, **memory_arguments(memory, residual))

    def decode(
        self, payload: Tensor, numel: int, out: Tensor | None = None, weight: float = 1.0, accumulate: bool = False
    ) -> Tensor:
        return K.cast_decode(payload, numel, self.kind, self.block, out=out, weight=weight, accumulate=accumulate)

    def merge(self, payloads: Tensor, numel: int, key: Key) -> Tensor:
        return K.cast_reduce(payloads, numel, self.kind, self.block)
