"""A world without a network, in which every other rank sends what this one sends: to run one rank's own work alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from .base import Done, Handle, Transport

if TYPE_CHECKING:
    from torch import Tensor


class EchoTransport(Transport):
    """Rank `rank` of `size`; every operation is done at once. What a root broadcasts to this rank is zeros."""

    ordered = False

    def __init__(self, rank: int, size: int) -> None:
        super().__init__()
        self.rank, self.size = rank, size

    def scoped(self, name: str) -> EchoTransport:
        return self

    def subgroup(self, ranks: Sequence[int]) -> EchoTransport:
        return EchoTransport(sorted(ranks).index(self.rank), len(ranks))

    def _all_reduce(self, x: Tensor) -> Handle:
        return Done(x * self.size)

    def _all_gather(self, x: Tensor) -> Handle:
        return Done(x.repeat(self.size, 1))

    def _all_to_all(self, x: Tensor, send: Sequence[int], receive: Sequence[int]) -> Handle:
        import torch

        mine = x.split(list(send))[self.rank]
        return Done(torch.cat([mine.new_zeros(n) if n != len(mine) else mine for n in receive]))

    def _broadcast(self, x: Tensor, root: int) -> Handle:
        return Done(x.clone() if root == self.rank else x.new_zeros(x.shape))

    def _send_recv(self, x: Tensor, to: int, source: int, receive: int | None) -> Handle:
        return Done(x.clone() if receive in (None, x.numel()) else x.new_zeros(receive))
