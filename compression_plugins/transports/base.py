"""The contract between collectives and whatever moves bytes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class Handle(Protocol):
    """An operation in flight."""

    def poll(self) -> bool:
        """True when `wait` will not block. Where the transport is `ordered`, False may mean that it is not known."""
        ...

    def wait(self) -> Tensor:
        """Block until done; the result. Call it once."""
        ...


class Done:
    """A handle whose result is known."""

    def __init__(self, result: Tensor) -> None:
        self._result = result

    def poll(self) -> bool:
        return True

    def wait(self) -> Tensor:
        return self._result


class Then:
    """A handle that passes the result of another one through a function."""

    def __init__(self, handle: Handle, function: Callable[[Tensor], Tensor]) -> None:
        self._handle, self._function = handle, function

    def poll(self) -> bool:
        return self._handle.poll()

    def wait(self) -> Tensor:
        return self._function(self._handle.wait())


class Transport(ABC):
    """Asynchronous collectives on flat, contiguous tensors, which the caller leaves alone until the handle is done.

    Attributes:
        rank, size: this process among those that take part.
        sent: payload bytes that this rank has sent so far, as a ring would send them (the network interface adds
        headers).
        typical: bytes that the operations of this object, not of other views, send on the mean rank. Ranks differ where
            shards do: who owns more sends less.
        ordered: True where every rank must start operations in the same order (torch.distributed); False where
            operations find each other by name (Horovod), so that work may be advanced whenever it happens to be ready.
    """

    rank: int
    size: int
    ordered: bool = True

    def __init__(self) -> None:
        self.sent = self.typical = 0.0

    def sums(self, dtype: torch.dtype) -> bool:
        """Whether `all_reduce` takes tensors of `dtype`."""
        return True

    def all_reduce(self, x: Tensor) -> Handle:
        """Elementwise sum over ranks, in the dtype of `x`."""
        self._sends(2 * (self.size - 1) / self.size * _nbytes(x))
        return self._all_reduce(x)

    def all_gather(self, x: Tensor) -> Handle:
        """Every rank's `x` (same length everywhere) as rows of [size, numel], in rank order."""
        self._sends((self.size - 1) * _nbytes(x))
        return self._all_gather(x)

    def all_gather_uneven(self, x: Tensor, lengths: Sequence[int]) -> Handle:
        """Every rank's `x`, of which rank i has `lengths[i]` elements, one behind the other in rank order; every rank
        knows all lengths.
        """
        self._count((self.size - 1) * _nbytes(x))
        return self._all_gather_uneven(x, lengths)

    def all_to_all(self, x: Tensor, send: Sequence[int], receive: Sequence[int]) -> Handle:
        """`x` is cut into `send[i]` elements for rank i; the result holds `receive[i]` elements from rank i, in
        rank order. `x` is as long on every rank.
        """
        self._count((sum(send) - send[self.rank]) * x.element_size())
        self.typical += sum(send) * (self.size - 1) / self.size * x.element_size()
        return self._all_to_all(x, send, receive)

    def broadcast(self, x: Tensor, root: int) -> Handle:
        """Rank `root`'s `x`; the others pass a tensor of the same length and dtype, whose content is not read."""
        self._sends((self.size - 1) / self.size * _nbytes(x))
        return self._broadcast(x, root)

    def reduce_scatter(self, x: Tensor, shards: Sequence[int]) -> Handle:
        """Elementwise sum over ranks of this rank's shard of `x`, which is cut into `shards[i]` elements for rank i.

        An all-to-all and a sum in rank order, in the dtype of `x`: as many bytes as a ring, rounded once per addend.
        """
        mine = shards[self.rank]
        inbox = self.all_to_all(x, shards, [mine] * self.size)
        return Then(inbox, lambda rows: rows.view(self.size, mine).sum(0, dtype=x.dtype))

    def send_recv(self, x: Tensor, to: int, source: int, receive: int | None = None) -> Handle:
        """Send `x` to rank `to`; the result is what rank `source` sent: `receive` elements, or as many as `x` has, if
        no rank says how many.

        Every rank takes part: `to` and `source` are a permutation of ranks and its inverse.
        """
        self._sends(_nbytes(x) if to != self.rank else 0)
        return self._send_recv(x, to, source, receive)

    @abstractmethod
    def scoped(self, name: str) -> Transport:
        """A view for one job whose operations are named under `name`; shares `sent`."""

    @abstractmethod
    def subgroup(self, ranks: Sequence[int]) -> Transport:
        """A transport of its own among some of these ranks, of which this is one, for example those of one host. What
        it sends counts in its `sent`, and in that of this one.

        Every rank of this transport calls it, at the same time and in the same order as the others, with the ranks of
        the group that it belongs to; groups do not overlap. Ranks count in ascending order.

        Raises:
            UnsupportedError: the host cannot make groups.
        """

    def _sends(self, nbytes: float) -> None:
        self.typical += nbytes
        self._count(nbytes)

    def _count(self, nbytes: float) -> None:
        self.sent += nbytes

    @abstractmethod
    def _all_reduce(self, x: Tensor) -> Handle: ...

    @abstractmethod
    def _all_gather(self, x: Tensor) -> Handle: ...

    def _all_gather_uneven(self, x: Tensor, lengths: Sequence[int]) -> Handle:
        return self._all_to_all(x.repeat(self.size), [x.numel()] * self.size, lengths)

    @abstractmethod
    def _all_to_all(self, x: Tensor, send: Sequence[int], receive: Sequence[int]) -> Handle: ...

    @abstractmethod
    def _broadcast(self, x: Tensor, root: int) -> Handle: ...

    @abstractmethod
    def _send_recv(self, x: Tensor, to: int, source: int, receive: int | None) -> Handle: ...

    def _partition(self, ranks: Sequence[int]) -> list[list[int]]:
        """The groups of `subgroup`, in order of their first ranks, from what every rank says of its own."""
        from .._lazy import torch

        firsts = self.all_gather(torch.tensor([min(ranks)], dtype=torch.int64)).wait().flatten().tolist()
        return [[rank for rank, other in enumerate(firsts) if other == first] for first in sorted(set(firsts))]


def _nbytes(x: Tensor) -> int:
    return x.numel() * x.element_size()
