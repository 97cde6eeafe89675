"""Transport over a `torch.distributed` process group: Gloo, NCCL, or any backend with the same collectives.

Operations run on the current stream of the caller's device, and `wait` orders that stream after them, as
`torch.distributed.Work` does; the host is blocked only by backends that compute on the host.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import count

import torch
import torch.distributed as dist
from torch import Tensor

from .base import Done, Handle, Transport
from .waiting import stay_awake

#: torch 2.13 renamed it; the old name warns there.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
#: Bytes exchanged by a rank, up to which ranks on the host use an all-to-all of the backend: who waits for it can poll,
#: and need not sleep. (Gloo's all-gather hands payloads round a ring, whose n - 1 hops each wait for a thread to wake.)
_SHORT = 1 << 19
#: Numbers of messages; those of scripts are below as a rule, and collectives have a space of their own.
_FIRST_TAG = _TAGS = 1 << 30


class PeerLostError(RuntimeError):
    """An exchange of compressed data has failed, because a rank is gone or does not answer; the cause is torch's own
    error.
    """


class TorchDistributed(Transport):
    """One rank of a process group.

    Args:
        group: the ranks that take part; None is the default group.

    Every rank must start operations in the same order (`ordered`): Gloo and NCCL match them by it. Where an operation
    fails, `wait` raises `PeerLostError`, with the rank that is lost where only one can be.
    """

    ordered = True

    def __init__(self, group: dist.ProcessGroup | None = None, _parent: TorchDistributed | None = None) -> None:
        super().__init__()
        self.group: dist.ProcessGroup = group if group is not None else dist.group.WORLD  # type: ignore[assignment]
        self.rank, self.size = dist.get_rank(self.group), dist.get_world_size(self.group)
        self._parent = _parent
        self._above: TorchDistributed | None = None  # of which this is a group
        if _parent is None:
            self._on_gloo = "cpu:gloo" in dist.get_backend_config(self.group).split(",")
            self._flying: deque[_Exchange] = deque()
            self._numbers = count()
        else:
            self._on_gloo, self._flying, self._numbers = _parent._on_gloo, _parent._flying, _parent._numbers

    def scoped(self, name: str) -> TorchDistributed:
        return TorchDistributed(self.group, self._parent or self)

    def subgroup(self, ranks: Sequence[int]) -> TorchDistributed:
        members = [dist.get_global_rank(self.group, rank) for rank in sorted(ranks)]
        # Among themselves: where this is a part of the job, the others do not know of it.
        part = TorchDistributed(dist.new_group(members, use_local_synchronization=True))
        part._above = self
        return part

    def _count(self, nbytes: float) -> None:
        (self._parent or self).sent += nbytes
        above = (self._parent or self)._above
        if above is not None:
            above._count(nbytes)

    def _all_reduce(self, x: Tensor) -> Handle:
        result = x.clone()
        if self.size == 1:
            return Done(result)
        return self._pending(dist.all_reduce(result, group=self.group, async_op=True), result, x)

    def _all_gather(self, x: Tensor) -> Handle:
        if self.size == 1:
            return Done(x.clone().view(1, -1))
        result = x.new_empty(self.size, x.numel())
        if self._is_long(result):
            return self._exchange(x, [x] * self.size, result, list(result))
        if x.is_cpu and result.nbytes <= _SHORT:
            copies = x.repeat(self.size)
            work = dist.all_to_all_single(result.view(-1), copies, group=self.group, async_op=True)
            return self._pending(work, result, copies)
        work = _all_gather(result.view(-1), x, group=self.group, async_op=True)
        return self._pending(work, result, x)

    def _all_gather_uneven(self, x: Tensor, lengths: Sequence[int]) -> Handle:
        result = x.new_empty(sum(lengths))
        if self.size > 1 and self._is_long(result):  # as long on every rank, which `x` is not
            return self._exchange(x, [x] * self.size, result, result.split(list(lengths)))
        return self._deal(x.repeat(self.size), [x.numel()] * self.size, lengths, long=False)

    def _all_to_all(self, x: Tensor, send: Sequence[int], receive: Sequence[int]) -> Handle:
        return self._deal(x, send, receive, self._is_long(x))

    def _broadcast(self, x: Tensor, root: int) -> Handle:
        result = x.clone() if root == self.rank else torch.empty_like(x)
        if self.size == 1:
            return Done(result)
        source = dist.get_global_rank(self.group, root)
        return self._pending(dist.broadcast(result, source, group=self.group, async_op=True), result, x)

    def _send_recv(self, x: Tensor, to: int, source: int, receive: int | None) -> Handle:
        # An all-to-all, whose empty parts cost no bytes: NCCL would need an isend and an irecv grouped.
        outward, inward = [0] * self.size, [0] * self.size
        outward[to], inward[source] = x.numel(), x.numel() if receive is None else receive
        return self._deal(x, outward, inward, receive is None and self._is_long(x))

    def _deal(self, x: Tensor, send: Sequence[int], receive: Sequence[int], long: bool) -> Handle:
        if self.size == 1:
            return Done(x.clone())
        result = x.new_empty(sum(receive))
        if long:
            return self._exchange(x, x.split(list(send)), result, result.split(list(receive)))
        work = dist.all_to_all_single(result, x, list(receive), list(send), group=self.group, async_op=True)
        return self._pending(work, result, x)

    def _pending(self, work: dist.Work | None, result: Tensor, source: Tensor) -> _Pending:
        peer = f"rank {1 - self.rank}" if self.size == 2 else "a rank"
        assert work is not None  # this process is one of the group
        return _Pending(work, result, source, f"rank {self.rank} lost {peer}")

    def _is_long(self, x: Tensor) -> bool:
        """Whether `_exchange` is the way of messages that are `x` in all; every rank has as many bytes."""
        return self._on_gloo and x.is_cpu and x.nbytes > _SHORT

    def _exchange(self, x: Tensor, outbox: Sequence[Tensor], result: Tensor, inbox: Sequence[Tensor]) -> Handle:
        """Send `outbox[i]`, a part of `x`, to rank i, and receive its message in `inbox[i]`, a part of `result`.

        Data moves in both directions at once, whichever rank comes first. Gloo sends when the receiver has allowed it,
        and a permission queues behind data that goes the same way. Its collectives send before they receive: the rank
        that comes last is sending when it allows the other one to, and they take turns.
        """
        tag = _FIRST_TAG + next(self._numbers) % _TAGS
        inbox[self.rank].copy_(outbox[self.rank])
        others = [(self.rank + i) % self.size for i in range(1, self.size)]
        works = [(self._post(dist.irecv, inbox[rank], rank, tag), rank) for rank in others if inbox[rank].numel()]
        works += [(self._post(dist.isend, outbox[rank], rank, tag), rank) for rank in others if outbox[rank].numel()]
        exchange = _Exchange(self.rank, works, result, x, self._flying)
        self._flying.append(exchange)
        return exchange

    def _post(self, start: Callable[..., dist.Work | None], x: Tensor, rank: int, tag: int) -> dist.Work:
        return start(x, dist.get_global_rank(self.group, rank), self.group, tag)  # type: ignore[return-value]


class _Pending:
    """A work in flight; keeps the input alive, which the backend reads until it is done."""

    def __init__(self, work: dist.Work, result: Tensor, source: Tensor, lost: str) -> None:
        self._work, self._result, self._source, self._lost = work, result, source, lost

    def poll(self) -> bool:
        return self._work.is_completed()

    def wait(self) -> Tensor:
        if self._result.is_cpu:  # elsewhere `wait` blocks a stream, not the host
            stay_awake(self.poll)
        with _telling(self._lost):
            self._work.wait()
        return self._result


@contextmanager
def _telling(lost: str) -> Iterator[None]:
    """Say who is lost where torch says which socket closed."""
    try:
        yield
    except RuntimeError as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise PeerLostError(
            f"{lost} in an exchange of compressed data: it died, hangs or cannot be reached; the first error of any "
            f"rank says why ({reason})"
        ) from error


class _Exchange:
    """Messages in flight between this rank and others.

    Their works hold the tensors, and a connection stalls where one is gone before its turn. So an exchange that nobody
    waits for, as its program was aborted, stays in `flying` until one that began later is done; then it is done too.
    """

    def __init__(
        self,
        rank: int,
        works: list[tuple[dist.Work, int]],
        result: Tensor,
        source: Tensor,
        flying: deque[_Exchange],
    ) -> None:
        self._rank, self._works, self._result, self._source, self._flying = rank, works, result, source, flying

    def poll(self) -> bool:
        return not self._works  # they do not say that they are done before somebody waits for them

    def wait(self) -> Tensor:
        while self._works:
            self._flying[0]._finish()
            self._flying.popleft()
        return self._result

    def _finish(self) -> None:
        while self._works:
            work, peer = self._works[0]
            with _telling(f"rank {self._rank} lost rank {peer}"):
                work.wait()  # at most once: a second time it would wait for a second message
            del self._works[0]
