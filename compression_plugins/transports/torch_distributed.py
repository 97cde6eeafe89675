"""Transport over a `torch.distributed` process group: Gloo, NCCL, or any backend with the same collectives.

Operations run on the current stream of the caller's device, and `wait` orders that stream after them, as
`torch.distributed.Work` does; the host is blocked only by backends that compute on the host.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from .base import Done, Handle, Transport
from .waiting import stay_awake

#: torch 2.13 renamed it; the old name warns there.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
#: Bytes gathered in all, up to which ranks on the host use an all-to-all, which sends to every rank at once. Gloo's
#: all-gather hands payloads round a ring, and each of its n - 1 hops waits for a thread to wake.
_DIRECT = 1 << 19


class TorchDistributed(Transport):
    """One rank of a process group.

    Args:
        group: the ranks that take part; None is the default group.

    Every rank must start operations in the same order (`ordered`): Gloo and NCCL match them by it.
    """

    ordered = True

    def __init__(self, group: dist.ProcessGroup | None = None, _parent: TorchDistributed | None = None) -> None:
        super().__init__()
        self.group: dist.ProcessGroup = group if group is not None else dist.group.WORLD  # type: ignore[assignment]
        self.rank, self.size = dist.get_rank(self.group), dist.get_world_size(self.group)
        self._parent = _parent

    def scoped(self, name: str) -> TorchDistributed:
        return TorchDistributed(self.group, self._parent or self)

    def subgroup(self, ranks: Sequence[int]) -> TorchDistributed:
        members = [dist.get_global_rank(self.group, rank) for rank in sorted(ranks)]
        # Among themselves: where this is a part of the job, the others do not know of it.
        return TorchDistributed(dist.new_group(members, use_local_synchronization=True))

    def _count(self, nbytes: float) -> None:
        (self._parent or self).sent += nbytes

    def _all_reduce(self, x: Tensor) -> Handle:
        result = x.clone()
        if self.size == 1:
            return Done(result)
        return _Pending(dist.all_reduce(result, group=self.group, async_op=True), result, x)

    def _all_gather(self, x: Tensor) -> Handle:
        if self.size == 1:
            return Done(x.clone().view(1, -1))
        result = x.new_empty(self.size, x.numel())
        if x.is_cpu and result.nbytes <= _DIRECT:
            copies = x.repeat(self.size)
            work = dist.all_to_all_single(result.view(-1), copies, group=self.group, async_op=True)
            return _Pending(work, result, copies)
        work = _all_gather(result.view(-1), x, group=self.group, async_op=True)
        return _Pending(work, result, x)

    def _all_to_all(self, x: Tensor, send: Sequence[int], receive: Sequence[int]) -> Handle:
        if self.size == 1:
            return Done(x.clone())
        result = x.new_empty(sum(receive))
        work = dist.all_to_all_single(result, x, list(receive), list(send), group=self.group, async_op=True)
        return _Pending(work, result, x)

    def _broadcast(self, x: Tensor, root: int) -> Handle:
        result = x.clone() if root == self.rank else torch.empty_like(x)
        if self.size == 1:
            return Done(result)
        source = dist.get_global_rank(self.group, root)
        return _Pending(dist.broadcast(result, source, group=self.group, async_op=True), result, x)

    def _send_recv(self, x: Tensor, to: int, source: int, receive: int) -> Handle:
        # Not isend and irecv: Gloo's works for these do not say that they are done before somebody waits for them, and
        # NCCL needs them grouped. The empty parts of an all-to-all cost no bytes.
        outward, inward = [0] * self.size, [0] * self.size
        outward[to], inward[source] = x.numel(), receive
        return self._all_to_all(x, outward, inward)


class _Pending:
    """A work in flight; keeps the input alive, which the backend reads until it is done."""

    def __init__(self, work: dist.Work, result: Tensor, source: Tensor) -> None:
        self._work, self._result, self._source = work, result, source

    def poll(self) -> bool:
        return self._work.is_completed()

    def wait(self) -> Tensor:
        if self._result.is_cpu:  # elsewhere `wait` blocks a stream, not the host
            stay_awake(self.poll)
        self._work.wait()
        return self._result
