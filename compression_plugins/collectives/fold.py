"""Payloads that merge on their way round a ring."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from ..transports.base import Handle, Transport

#: `merge(received, own, a, b)` joins the received aggregate of `a` ranks with this rank's aggregate of `b`.
Merge = Callable[["Tensor", "Tensor", int, int], "Tensor"]
Parts = Generator["Handle", Any, list["Tensor"]]


def ring_fold(transport: Transport, parts: list[Tensor], merge: Merge) -> Parts:
    """Reduce-scatter then all-gather round a ring of `size` ranks, 2(size-1) hops of one part each.

    Args:
        parts: this rank's payload of each of `size` segments, all of one length. Only `parts[rank]` is sent as it is;
            the others go to `merge`.

    Returns:
        The merged parts in segment order, the same bits on every rank.
    """
    ring = range(transport.size)
    parts = yield from reduce_round(transport, ring, parts, lambda received, own, hops: merge(received, own, hops, 1))
    return (yield from gather_round(transport, ring, parts))


def reduce_round(
    transport: Transport, ring: Sequence[int], parts: list[Tensor], merge: Callable[[Tensor, Tensor, int], Tensor]
) -> Parts:
    """One way round `ring`, ranks of which this is one: afterwards its i-th member holds part i + 1 of all members.

    Args:
        parts: one per member.
        merge: `merge(received, own, hops)` joins what `hops` members have made of a part with this rank's own.
    """
    place, right, left = _neighbours(transport, ring)
    parts = list(parts)
    for hop in range(1, len(ring)):
        outgoing, incoming = (place - hop + 1) % len(ring), (place - hop) % len(ring)
        received = yield transport.send_recv(parts[outgoing], to=right, source=left)
        parts[incoming] = merge(received, parts[incoming], hop)
    return parts


def gather_round(transport: Transport, ring: Sequence[int], parts: list[Tensor]) -> Parts:
    """One more way round: every member gets the parts that the others hold after `reduce_round`."""
    place, right, left = _neighbours(transport, ring)
    parts = list(parts)
    for hop in range(len(ring) - 1):
        outgoing, incoming = (place + 1 - hop) % len(ring), (place - hop) % len(ring)
        parts[incoming] = yield transport.send_recv(parts[outgoing], to=right, source=left)
    return parts


def _neighbours(transport: Transport, ring: Sequence[int]) -> tuple[int, int, int]:
    place = ring.index(transport.rank)
    return place, ring[(place + 1) % len(ring)], ring[place - 1]
