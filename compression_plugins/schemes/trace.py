"""What a scheme sends, found by letting one rank run it without a network."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from .. import triton_kernels as K
from .._lazy import torch
from ..core.call import Call, Segment, total
from ..core.clock import Clock
from ..core.memory import Vector
from ..transports.echo import EchoTransport

if TYPE_CHECKING:
    from torch import Tensor

    from ..transports.base import Handle
    from .base import Scheme

_ROUND = 1  # a usual step: what a scheme does now and then, it does in round 0


def traced_bits(scheme: Scheme, segments: Sequence[Segment], size: int, device: str = "cpu") -> float:
    """Bits that each of `size` ranks sends in one average of a bucket of `segments`, the mean over ranks.

    One rank's operations stand for all: they are counted as their mean over ranks, and all ranks hand in equal lengths.
    """
    transport = _Mean(0, size)
    numel = total(segments)
    slots = _Slots(numel, device)
    key = K.Key(0, 0, _ROUND, 0)
    call = Call(transport, key, Clock(_ROUND, 0, _ROUND), segments, None, slots)
    program = scheme.mean(torch.ones(numel, device=device), call)
    value = None
    while True:
        try:
            value = program.send(value).wait()
        except StopIteration:
            return 8 * transport.sent


class _Mean(EchoTransport):
    """Counts what a rank sends on average: owners of long shards and of short ones."""

    def all_to_all(self, x: Tensor, send: Sequence[int], receive: Sequence[int]) -> Handle:
        self._count((self.size - 1) / self.size * sum(send) * x.element_size())
        return self._all_to_all(x, send, receive)


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
