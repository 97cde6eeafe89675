"""What a codec is: a tensor to a payload of known length and back."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from ..core.memory import Memory, Vector
    from ..triton_kernels import Key


class Codec(ABC):
    """Payloads are contiguous `uint8` tensors `[scales | codes]`, little-endian, bits LSB first, a multiple of 4 bytes
    long.

    Attributes:
        block: shards are cut at multiples of it, so that a shard's blocks are the whole tensor's blocks.
    """

    block: int

    @abstractmethod
    def nbytes(self, numel: int) -> int:
        """Exact payload length in bytes for `numel` elements."""

    def scale_bytes(self, numel: int) -> int | None:
        """Bytes of the scales in a payload when each block is coded by itself, so that the payload of whole blocks is a
        slice of the scales and a slice of the codes; None, as here, when it is not.
        """
        return None

    @abstractmethod
    def encode(
        self,
        x: Tensor,
        key: Key,
        memory: Memory | None = None,
        residual: Vector | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        """Compress flat `x` (fp32, fp16, bf16) into a payload, written to `out` when given.

        With a memory, `x` is compensated first by `residual.old`, and `residual.new` is written (fp32, same length).
        """

    @abstractmethod
    def decode(
        self, payload: Tensor, numel: int, out: Tensor | None = None, weight: float = 1.0, accumulate: bool = False
    ) -> Tensor:
        """fp32 values, times `weight`; with `accumulate`, added to `out`."""

    @abstractmethod
    def merge(self, payloads: Tensor, numel: int, key: Key) -> Tensor:
        """Decode the rows of `payloads` (uint8 [n, nbytes]), average them in rank order and encode the mean."""

    def average(self, payloads: Tensor, numel: int, out: Tensor) -> Tensor:
        """Decode the rows of `payloads` (uint8 [n, nbytes]) and write their mean, summed in rank order, to `out`."""
        for i, payload in enumerate(payloads if numel else ()):
            self.decode(payload, numel, out=out, weight=1 / len(payloads), accumulate=i > 0)
        return out

    def payload_bits(self, numel: int) -> int:
        """Payload size in bits; `8 * len(payload)` of every payload."""
        return 8 * self.nbytes(numel)


def memory_arguments(memory: Memory | None, residual: Vector | None) -> dict[str, Any]:
    """Keyword arguments for a fused encode kernel: none at all without a memory."""
    return {} if memory is None or residual is None else memory.kernel_arguments(residual)
