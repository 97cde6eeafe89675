"""Two levels: the ranks of a node average dense among themselves first, and what they share crosses nodes compressed.

Each rank of a node owns an equal part of every tensor: it gets the node's average of its part, reduces it with the
ranks of the other nodes that own the same part, and hands the result to its neighbours. So every byte that crosses
nodes does so once per node and not once per rank, all ranks compress at the same time, and each remembers its own part
only. All ranks start the same operations in the same order, which transports may demand: parts are equally long,
filled up with zeros where a tensor cannot be divided.
"""

from __future__ import annotations

import hashlib
import socket
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from ..core.call import Program, Reduction
from ..errors import UnsupportedError
from ..transports.base import Transport
from .parts import collect, dealt
from .plan import Bucket, part


class Levels:
    """The two groups of ranks that this one belongs to. Every rank of `transport` makes its own at the same time.

    Args:
        transport: all ranks.
        levels: ranks of a node, which follow each other; or `node`: those that share a host.
        device: of the tensors by which ranks learn where the others are.

    Raises:
        UnsupportedError: nodes have different numbers of ranks, or the host cannot make groups.

    Attributes:
        node: ranks of a node.
        nodes: their number.
        inner: the ranks of this node.
        outer: the ranks of all nodes that own the same part.
    """

    def __init__(self, transport: Transport, levels: int | Literal["node"], device: torch.device | str = "cpu") -> None:
        places = [rank // levels for rank in range(transport.size)] if levels != "node" else _hosts(transport, device)
        members: dict[int, list[int]] = {}
        for rank, place in enumerate(places):
            members.setdefault(place, []).append(rank)
        mine = members[places[transport.rank]]
        self.node, self.nodes = len(mine), len(members)
        if any(len(ranks) != self.node for ranks in members.values()):
            raise UnsupportedError(
                f"levels: {levels}: nodes must have as many ranks each, and here have "
                f"{', '.join(str(len(ranks)) for ranks in members.values())}: start as many on each, or remove levels"
            )
        self.index = mine.index(transport.rank)
        self.inner = self.outer = transport
        if self.node > 1 and self.nodes > 1:
            self.inner = transport.subgroup(mine)
            self.outer = transport.subgroup([ranks[self.index] for ranks in members.values()])

    def part(self, bucket: Bucket) -> Bucket:
        """What this rank owns of `bucket`."""
        return part(bucket, self.node, self.index)

    def filling(self, bucket: Bucket) -> list[slice]:
        """Elements of `self.part(bucket)` that stand behind the end of a tensor of `bucket`."""
        found, place = [], 0
        for whole, own in zip(bucket.segments, self.part(bucket).segments):
            behind = min(own.numel, own.start + own.numel - whole.start - whole.numel)
            place += own.numel
            if behind > 0:
                found.append(slice(place - behind, place))
        return found

    def mean(
        self, bucket: Bucket, x: Tensor, across: Callable[[Tensor, Transport], Reduction]
    ) -> Program[tuple[Tensor, float]]:
        """Average flat fp32 `x` of `bucket` over all ranks, by `across` where nodes meet: `x`, which is overwritten,
        and the bytes that this has sent on the mean rank.

        Args:
            across: averages the node's mean of `self.part(bucket)` over the ranks of a transport.
        """
        name, length = f"{bucket.id:08x}", self.part(bucket).numel
        inner, outer = self.inner.scoped(f"{name}.inside"), self.outer.scoped(f"{name}.across")
        lengths = [segment.numel for segment in self.part(bucket).segments]
        owned = yield inner.reduce_scatter(dealt(bucket.segments, lengths, x, self.node), [length] * self.node)
        owned.div_(self.node)
        if self.nodes > 1:
            owned = yield from across(owned, outer)
        rows = yield inner.all_gather(owned)
        collect(bucket.segments, lengths, rows, x)
        return x, inner.typical + outer.typical


def _hosts(transport: Transport, device: torch.device | str) -> list[int]:
    """A number for the host of each rank."""
    name = hashlib.blake2b(socket.gethostname().encode(), digest_size=7).digest()
    mine = torch.tensor([int.from_bytes(name, "little")], dtype=torch.int64, device=device)
    return transport.scoped("hosts").all_gather(mine).wait().flatten().tolist()
