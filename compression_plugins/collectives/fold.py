"""Payloads that merge on their way round a ring."""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from ..transports.base import Handle, Transport


def ring_fold(
    transport: Transport, parts: list[Tensor], merge: Callable[[Tensor, Tensor, int], Tensor]
) -> Generator[Handle, Any, list[Tensor]]:
    """Reduce-scatter then all-gather round a ring of `size` ranks, 2(size-1) hops of one part each.

    Args:
        parts: this rank's payload of each of `size` segments, all of one length.
        merge: `merge(received, own, hops)` joins the aggregate of `hops` ranks with this rank's own part.

    Returns:
        The merged parts in segment order, the same bits on every rank.
    """
    size, rank = transport.size, transport.rank
    right, left = (rank + 1) % size, (rank - 1) % size
    parts = list(parts)
    for hop in range(1, size):
        outgoing, incoming = (rank - hop + 1) % size, (rank - hop) % size
        received = yield transport.exchange(parts[outgoing], to=right, source=left)
        parts[incoming] = merge(received, parts[incoming], hop)
    for hop in range(size - 1):
        outgoing, incoming = (rank + 1 - hop) % size, (rank - hop) % size
        parts[incoming] = yield transport.exchange(parts[outgoing], to=right, source=left)
    return parts
