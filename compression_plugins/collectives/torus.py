"""Payloads that merge on their way over a torus: rings along the rows, then along the columns."""

from __future__ import annotations

from math import isqrt
from typing import TYPE_CHECKING

from .._lazy import torch
from .fold import Merge, Parts, gather_round, reduce_round

if TYPE_CHECKING:
    from torch import Tensor

    from ..transports.base import Transport


def torus_fold(transport: Transport, parts: list[Tensor], rows: int, merge: Merge) -> Parts:
    """What `ring_fold` does, with as many bytes, in 2(columns-1) + 2(rows-1) hops instead of 2(size-1).

    Rank r stands in row r // columns and column r % columns: ranks that are numbered node by node, `columns` to a node,
    have their rows inside nodes. Each row reduce-scatters by a ring, so that a rank ends with one column's share, an
    aggregate of `columns` ranks; each column all-reduces its share by a ring, where at hop h an aggregate of
    h * columns ranks meets one of `columns`; each row all-gathers.

    Args:
        parts: this rank's payload of each of `size` segments, all of one length.
        rows: divides `size`; 1 (or `size`) is the ring of all ranks.

    Returns:
        The merged parts in segment order, the same bits on every rank.
    """
    columns = transport.size // rows
    row, column = divmod(transport.rank, columns)
    across = range(row * columns, (row + 1) * columns)
    down = range(column, transport.size, columns)
    length = len(parts[0])

    shares = [torch.cat(parts[start : start + rows]) for start in range(0, transport.size, rows)]
    shares = yield from reduce_round(
        transport, across, shares, lambda received, own, hops: merge(received, own, hops, 1)
    )
    mine = (column + 1) % columns
    pieces = yield from reduce_round(
        transport,
        down,
        _cut(shares[mine], length, rows),
        lambda received, own, hops: merge(received, own, hops * columns, columns),
    )
    shares[mine] = torch.cat((yield from gather_round(transport, down, pieces)))
    shares = yield from gather_round(transport, across, shares)
    return [piece for share in shares for piece in _cut(share, length, rows)]


def square_rows(size: int) -> int:
    """Rows of the torus of `size` ranks that is nearest to a square and not higher than wide; 1 for a prime."""
    return next(rows for rows in range(isqrt(size), 0, -1) if size % rows == 0)


def _cut(share: Tensor, length: int, rows: int) -> list[Tensor]:
    return [share[row * length : (row + 1) * length] for row in range(rows)]
