"""What a scheme sends, found by letting one rank run it without a network."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from .. import triton_kernels as K
from .._lazy import torch
from ..core.call import Call, Reduction, Segment, total
from ..core.clock import Clock
from ..core.memory import Vector
from ..transports.echo import EchoTransport

if TYPE_CHECKING:
    from torch import Tensor

_ROUND = 1  # a usual step: what a scheme does now and then, it does in round 0


def traced_bits(
    mean: Callable[[Tensor, Call], Reduction], segments: Sequence[Segment], size: int, device: str = "cpu"
) -> float:
    """Bits that each of `size` ranks sends in one average of a bucket of `segments`, the mean over ranks.

    Args:
        mean: of a scheme.

    Rank 0's operations stand for all: ranks hand in equal lengths, and shards cut alike.
    """
    transport = EchoTransport(0, size)
    numel = total(segments)
    slots = _Slots(numel, device)
    key = K.Key(0, 0, _ROUND, 0)
    call = Call(transport, key, Clock(_ROUND, 0, _ROUND), segments, None, slots)
    program = mean(torch.ones(numel, device=device), call)
    value = None
    while True:
        try:
            value = program.send(value).wait()
        except StopIteration:
            return 8 * transport.typical


class _Slots:
    """State that nobody keeps."""

    def __init__(self, numel: int, device: str) -> None:
        self._numel, self._device = numel, device

    def vector(self, slot: str, peer: int | None = None) -> Tensor:
        return torch.zeros(self._numel, device=self._device)

    def exchange(self, slot: str, peer: int | None = None) -> Vector:
        return Vector(self.vector(slot), self.vector(slot))

    def tensor(self, slot: str, name: str, make: Callable[[], Tensor]) -> Tensor:
        return make()
