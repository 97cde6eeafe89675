"""Transport over Horovod's asynchronous operations.

Horovod matches operations of different ranks by name, so every operation here has one: ranks may then start them in
any order, and names repeat from step to step, which its response cache needs. Unnamed operations are matched by a
counter of the process and silently pair different tensors as soon as two ranks take different branches.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from horovod.common import process_sets as hvd_process_sets
from horovod.torch import mpi_ops
from torch import Tensor

from ..errors import CompressionError, UnsupportedError
from .base import Done, Handle, Transport
from .waiting import stay_awake

#: Seconds between the polls of a long wait. `mpi_ops.synchronize` spins instead and, with as many ranks as cores,
#: starves the thread that communicates.
POLL_INTERVAL_S = 50e-6


class HorovodTransport(Transport):
    """The ranks of one Horovod process set.

    Args:
        name: prefix of the operations' names; equal on all ranks, unique among transports in use at the same time.
        process_set: the ranks that take part; None for all. `rank` and `size` count within it.

    Raises:
        horovod.common.exceptions.HorovodInternalError: from `wait`, if a peer died or Horovod was shut down.
    """

    ordered = False

    def __init__(self, name: str, process_set: mpi_ops.ProcessSet | None = None) -> None:
        super().__init__()
        self.process_set = process_set or mpi_ops.global_process_set
        self.rank, self.size = self.process_set.rank(), self.process_set.size()
        self._name, self._root, self._calls = name, self, 0
        self._above: HorovodTransport | None = None  # of which this is a group

    def scoped(self, name: str) -> HorovodTransport:
        view = object.__new__(HorovodTransport)
        view.__dict__.update(self.__dict__, _name=f"{self._name}.{name}", _calls=0, typical=0.0)
        return view

    def subgroup(self, ranks: Sequence[int]) -> HorovodTransport:
        """Needs `HOROVOD_DYNAMIC_PROCESS_SETS=1`: Horovod otherwise takes its groups at `hvd.init()` only."""
        name = f"{self._name}.{min(ranks)}"
        try:
            for part in self._partition(ranks):
                members = _process_set([self.process_set.ranks[rank] for rank in part])
                if self.rank in part:
                    mine = HorovodTransport(name, members)
                    mine._above = self
        except ValueError as error:
            raise UnsupportedError(
                f"horovod: groups of ranks need HOROVOD_DYNAMIC_PROCESS_SETS=1 in the environment ({error})"
            ) from None
        return mine

    def _count(self, nbytes: float) -> None:
        self._root.sent += nbytes
        if self._root._above is not None:
            self._root._above._count(nbytes)

    def _next(self, operation: str) -> dict[str, Any]:
        self._calls += 1
        return {"name": f"{self._name}.{self._calls}.{operation}", "process_set": self.process_set}

    def sums(self, dtype: torch.dtype) -> bool:
        """Horovod 0.28 has no all-reduce of bfloat16."""
        return dtype != torch.bfloat16

    def _all_reduce(self, x: Tensor) -> Handle:
        if x.numel() == 0:
            return Done(x.clone())
        return HorovodHandle(mpi_ops.allreduce_async(x, op=mpi_ops.Sum, **self._next("sum")))

    def _all_gather(self, x: Tensor) -> Handle:
        if x.numel() == 0:
            return Done(x.new_empty(self.size, 0))
        handle = mpi_ops.allgather_async(x, **self._next("gather"))

        def check(out: Tensor) -> Tensor:
            if out.numel() != self.size * x.numel():
                raise CompressionError(
                    f"all-gather of rank {self.rank}: {self.size} ranks sent {out.numel()} elements in all, where each "
                    f"should send {x.numel()}"
                )
            return out.view(self.size, x.numel())

        return HorovodHandle(handle, check)

    def _all_to_all(self, x: Tensor, send: Sequence[int], receive: Sequence[int]) -> Handle:
        splits = torch.tensor(send, dtype=torch.int32)
        handle = mpi_ops.alltoall_async(x, splits=splits, **self._next("all_to_all"))

        def check(out: tuple[Tensor, Tensor]) -> Tensor:
            if out[1].tolist() != list(receive):
                found = out[1].tolist()
                wrong = [rank for rank, n in enumerate(receive) if found[rank] != n]
                raise CompressionError(
                    f"all-to-all of rank {self.rank}: rank {wrong[0]} sent {found[wrong[0]]} elements where "
                    f"{receive[wrong[0]]} were due"
                )
            return out[0]

        return HorovodHandle(handle, check)

    def _broadcast(self, x: Tensor, root: int) -> Handle:
        if x.numel() == 0:
            return Done(x.clone())
        # Horovod counts the root among all ranks, even within a process set.
        handle = mpi_ops.broadcast_async(x, self.process_set.ranks[root], **self._next("broadcast"))
        return HorovodHandle(handle)

    def _send_recv(self, x: Tensor, to: int, source: int, receive: int | None) -> Handle:
        """Horovod cannot send and receive: an all-to-all with splits of zero elsewhere takes a cycle of its loop."""
        outward, inward = [0] * self.size, [0] * self.size
        outward[to], inward[source] = x.numel(), x.numel() if receive is None else receive
        return self._all_to_all(x, outward, inward)


def _process_set(ranks: Sequence[int]) -> mpi_ops.ProcessSet:
    """That of these ranks: the one that there is, for Horovod makes no second one, or a new one.

    Raises:
        ValueError: Horovod may not make groups after its start.
    """
    for number, members in hvd_process_sets._basics._get_process_set_ids_and_ranks().items():
        if list(members) == list(ranks):
            found = hvd_process_sets._temp_process_set_object(number)
            found.ranks = list(ranks)
            return found
    return hvd_process_sets.add_process_set(list(ranks))


class HorovodHandle:
    """A Horovod operation in flight, and what turns its output into the result."""

    def __init__(self, handle: int, finish: Callable[[Any], Tensor] | None = None) -> None:
        self._handle, self._finish = handle, finish

    def poll(self) -> bool:
        return bool(mpi_ops.poll(self._handle))

    def wait(self) -> Tensor:
        if not stay_awake(self.poll):
            while not self.poll():
                time.sleep(POLL_INTERVAL_S)
        out = mpi_ops.synchronize(self._handle)
        return out if self._finish is None else self._finish(out)
