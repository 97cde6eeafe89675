"""A transport whose messages carry checksums: damage on the way ends the job, and names the rank that it came from.

What is summed on the way has no checksum of its own: two sums cannot be compared with what each rank has sent.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from .._lazy import torch
from ..errors import CompressionError
from .base import Handle, Then, Transport

if TYPE_CHECKING:
    import torch as _torch
    from torch import Tensor

SEAL = 16  # bytes


class DamagedError(CompressionError):
    """A message is not what its sender has sent."""


class Verified(Transport):
    """`inner`, with a checksum of 16 bytes in every message that is not a sum.

    The sum of all 8-byte words and the sum of each times its place, modulo 2^64: one flipped bit, a piece that is
    missing and pieces that changed places show. It finds accidents; whoever can forge a message can forge it too.

    Args:
        about: what the messages are part of, for the error.

    Raises:
        DamagedError: from `wait`, on the rank that has received the damage.
    """

    def __init__(self, inner: Transport, about: str = "") -> None:
        self._inner, self.about = inner, about
        self.rank, self.size, self.ordered, self.typical = inner.rank, inner.size, inner.ordered, 0.0

    @property
    def sent(self) -> float:  # type: ignore[override]
        """Bytes, those of checksums included."""
        return self._inner.sent

    def sums(self, dtype: _torch.dtype) -> bool:
        return self._inner.sums(dtype)

    def scoped(self, name: str) -> Verified:
        return Verified(self._inner.scoped(name), name)

    def subgroup(self, ranks: Sequence[int]) -> Verified:
        return Verified(self._inner.subgroup(ranks), self.about)

    def _count(self, nbytes: float) -> None:
        """The transport inside counts."""

    def _all_reduce(self, x: Tensor) -> Handle:
        return self._inner.all_reduce(x)

    def _all_gather(self, x: Tensor) -> Handle:
        def opened(rows: Tensor) -> Tensor:
            return torch.stack([self._opened(row, x, rank) for rank, row in enumerate(rows)])

        return Then(self._inner.all_gather(_sealed(x)), opened)

    def _all_to_all(self, x: Tensor, send: Sequence[int], receive: Sequence[int]) -> Handle:
        outbox = torch.cat([_sealed(part) for part in x.split(list(send))])
        lengths = [x.element_size() * n + SEAL for n in receive]

        def opened(inbox: Tensor) -> Tensor:
            return torch.cat([self._opened(part, x, rank) for rank, part in enumerate(inbox.split(lengths))])

        return Then(self._inner.all_to_all(outbox, [x.element_size() * n + SEAL for n in send], lengths), opened)

    def _broadcast(self, x: Tensor, root: int) -> Handle:
        return Then(self._inner.broadcast(_sealed(x), root), lambda data: self._opened(data, x, root))

    def _send_recv(self, x: Tensor, to: int, source: int, receive: int | None) -> Handle:
        length = None if receive is None else x.element_size() * receive + SEAL
        handle = self._inner.send_recv(_sealed(x), to, source, length)
        return Then(handle, lambda data: self._opened(data, x, source))

    def _opened(self, data: Tensor, like: Tensor, rank: int) -> Tensor:
        """What was sealed, of the dtype of `like`."""
        body, seal = data[:-SEAL], data[-SEAL:]
        if len(data) < SEAL or not torch.equal(_checksum(body), seal):
            raise DamagedError(
                f"verify: what rank {rank} has sent to rank {self.rank} for {self.about or 'a collective'} arrived "
                "damaged: its checksum does not fit. A network or a memory is at fault: resume from a checkpoint, and "
                "without this host if it comes again"
            )
        return body.clone().view(like.dtype)


def _sealed(x: Tensor) -> Tensor:
    data = x.detach().contiguous().view(-1).view(torch.uint8)
    return torch.cat([data, _checksum(data)])


def _checksum(data: Tensor) -> Tensor:
    """uint8 [16] of uint8 [n], on its device."""
    words = data.new_zeros(-(-len(data) // 8) * 8)
    words[: len(data)] = data
    values = words.view(torch.int64)
    places = torch.arange(1, len(values) + 1, device=data.device)
    return torch.stack([values.sum() + len(data), (values * places).sum()]).view(torch.uint8)
