"""Two bits per element: a sign and one of two magnitudes, which are means of the block's own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from .. import triton_kernels as K
from .._lazy import torch
from .base import Codec

if TYPE_CHECKING:
    from torch import Tensor

    from ..core.memory import Memory, Vector
    from ..triton_kernels import Key


@dataclass(frozen=True)
class TwoMagnitudes(Codec):
    """|x| above the block's mean |x| -> the mean of those; any other |x| -> the mean of the rest; sign(0) = +1.

    Layout: (low, high) fp32 of each block, then codes of two bits (bit 0: 1 means >= 0; bit 1: high), padded to whole
    4-byte words. A block with NaN or Inf decodes to NaN.

    It is made of PyTorch operations, many passes over its input: for the few values that a sparse method keeps.
    """

    block: int = 512

    def nbytes(self, numel: int) -> int:
        return self.scale_bytes(numel) + 4 * K.layout.words(numel, 2)

    def scale_bytes(self, numel: int) -> int:
        return 8 * K.layout.blocks(numel, self.block)

    def encode(
        self,
        x: Tensor,
        key: Key,
        memory: Memory | None = None,
        residual: Vector | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        p = x.float() if memory is None or residual is None else memory.compensate(x, residual)
        sizes = self._rows(p.abs().double())
        there = self._rows(torch.ones_like(p, dtype=torch.bool))
        mean = sizes.sum(1, keepdim=True) / there.sum(1, keepdim=True)
        high = sizes > mean
        magnitudes = torch.stack([_mean(sizes, there & ~high), _mean(sizes, high)], 1)
        magnitudes = magnitudes.where(mean.isfinite(), torch.nan).float()
        codes = 2 * high.view(-1)[: p.numel()].to(torch.int32) + (p >= 0)
        payload = torch.cat([magnitudes.view(-1).view(torch.uint8), K.pack_bits(codes, 2)])
        if memory is not None and residual is not None:
            memory.update(x, residual, self.decode(payload, p.numel()))
        return payload if out is None else out.copy_(payload)

    def decode(
        self, payload: Tensor, numel: int, out: Tensor | None = None, weight: float = 1.0, accumulate: bool = False
    ) -> Tensor:
        cut = self.scale_bytes(numel)
        codes = K.unpack_bits(payload[cut:], numel, 2)
        place = torch.arange(numel, device=payload.device).div_(self.block, rounding_mode="floor").mul_(2)
        values = payload[:cut].view(torch.float32)[place + (codes >> 1)].mul_((2 * (codes & 1) - 1) * weight)
        return values if out is None else out.add_(values) if accumulate else out.copy_(values)

    def merge(self, payloads: Tensor, numel: int, key: Key) -> Tensor:
        return self.encode(self.average(payloads, numel, payloads.new_empty(numel, dtype=torch.float32)), key)

    def _rows(self, x: Tensor) -> Tensor:
        """[blocks, block], zeros beyond the end."""
        count = K.layout.blocks(x.numel(), self.block)
        return torch.nn.functional.pad(x, (0, count * self.block - x.numel())).view(count, self.block)


def _mean(sizes: Tensor, chosen: Tensor) -> Tensor:
    """Mean of the chosen ones of each row; 0 where there are none."""
    return sizes.where(chosen, 0).sum(1) / chosen.sum(1).clamp(min=1)
