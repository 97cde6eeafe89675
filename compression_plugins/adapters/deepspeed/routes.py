"""How the buffers of ZeRO are cut into what one scheme reduces together, and what that means for a plan."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from ...core.call import Segment
from ...engine.plan import Bucket, Plan
from ...schemes.base import Scheme
from .scope import Layout, Piece, mismatch


class Part(NamedTuple):
    """The elements of a buffer that one scheme reduces together.

    Attributes:
        bucket: segments in the order of the flat vector that the reducer gets.
        order: indices of the buffer's runs, in that order.
        lengths: of these runs.
        pieces: of parameters, one a run.
        shards: elements that each rank owns (reduce-scatter form), or None (all-reduce form).
        kept: positions in `order` of the runs whose result this rank needs.
    """

    bucket: Bucket
    order: tuple[int, ...]
    lengths: list[int]
    pieces: list[Piece]
    shards: list[int] | None
    kept: tuple[int, ...]


class Route(NamedTuple):
    """How one buffer is cut into runs, and what becomes of them."""

    runs: list[int]
    parts: tuple[Part, ...]


class Router:
    """The routes of the buffers seen so far.

    Args:
        plan: says which scheme reduces which parameter.
        rank, size: among the ranks that reduce.
        dense: whether the host scatters what is not compressed, too.
    """

    def __init__(self, plan: Plan, rank: int, size: int, dense: bool = False) -> None:
        self._known = {s.name: (bucket, s) for bucket in plan.buckets for s in bucket.segments}
        self._rank, self._size, self._dense = rank, size, dense
        self._routes: dict[tuple[Any, ...], Route] = {}

    def of(self, layout: Layout, start: int, numel: int, owner: int | None, device: torch.device) -> Route:
        """The route of elements [start, start + numel) of the announced buffers.

        Args:
            owner: rank that alone needs the sum; None when the layout says who needs what.

        Raises:
            UnsupportedError: the host reduces something else than it has announced.
        """
        key = (layout.key, start, numel, owner, device)
        route = self._routes.get(key)
        if route is None:
            pieces = layout.take(start, numel)
            if owner is not None and any(piece.owner != owner for piece in pieces):
                raise mismatch(f"a slice announced for another rank is reduced to rank {owner}")
            route = self._routes[key] = self._build(pieces, str(device))
        return route

    def _build(self, pieces: list[Piece], device: str) -> Route:
        """Group the pieces by scheme; where ranks own them and the scheme can scatter, order them by owner."""
        groups: dict[tuple[Scheme, str], list[tuple[int, Piece]]] = {}
        for index, piece in enumerate(pieces):
            if piece.name not in self._known:
                raise mismatch(f"parameter {piece.name!r} is reduced but was not there at start-up")
            bucket = self._known[piece.name][0]
            groups.setdefault((bucket.scheme, bucket.dtype), []).append((index, piece))
        parts = []
        for (scheme, dtype), members in groups.items():
            owned = scatters(scheme, self._dense) and all(piece.owner is not None for _, piece in members)
            if owned:
                members = sorted(members, key=lambda member: member[1].owner or 0)
            mine = [piece for _, piece in members]
            direction = self._known[mine[0].name][0].direction
            segments = tuple(self._join(mine, owned))
            bucket = Bucket(
                scheme, segments, device, dtype, sharded=owned, host_scatters=self._dense, direction=direction
            )
            kept = tuple(i for i, piece in enumerate(mine) if piece.owner in (None, self._rank))
            sizes = [sum(p.numel for p in mine if p.owner == rank) for rank in range(self._size)]
            order = tuple(i for i, _ in members)
            parts.append(Part(bucket, order, [p.numel for p in mine], mine, sizes if owned else None, kept))
        return Route([piece.numel for piece in pieces], tuple(parts))

    def _join(self, pieces: list[Piece], owned: bool) -> list[Segment]:
        """Segments of a bucket. Without owners, consecutive slices of one parameter are one segment again."""
        segments: list[Segment] = []
        for name, start, numel, _ in pieces:
            last = segments[-1] if segments else None
            if not owned and last is not None and last.name == name and last.start + last.numel == start:
                start, numel = last.start, last.numel + numel
                segments.pop()
            whole = self._known[name][1]
            shape = whole.shape if (start, numel) == (0, whole.numel) else None
            segments.append(Segment(name, start, numel, shape, whole.row))
        return segments


def scatters(scheme: Scheme, dense: bool = False) -> bool:
    """Whether `scheme` reduces every slice to its owner only. What is not compressed is all-reduced at stages 1 and 2,
    as DeepSpeed does it, and scattered at stage 3 (`dense`).
    """
    return "scatter_mean" in scheme.operations and (dense or not scheme.host_dense)


def in_wire_dtype(plan: Plan, wire: torch.dtype) -> Plan:
    """`plan` with buckets of the dtype in which the host would send them; what is not compressed travels in it."""
    name = str(wire).removeprefix("torch.")
    return Plan(tuple(replace(bucket, dtype=name) for bucket in plan.buckets), plan.rows)


def as_host_fills(plan: Plan, names: Sequence[str], limit: int, sharded: bool, dense: bool = False) -> Plan:
    """`plan` with the buckets that ZeRO will make of it.

    Args:
        names: of the parameters, in the order in which their gradients come.
        limit: elements of one of the host's buffers.
        sharded: whether the host reduces every slice to its owner only.
        dense: also of what is not compressed.
    """
    known = {s.name: (bucket, s) for bucket in plan.buckets for s in bucket.segments}
    buffers: list[list[str]] = [[]]
    filled = 0
    for name in names:
        numel = known[name][1].numel
        if filled + numel > limit and buffers[-1]:
            buffers.append([])
            filled = 0
        buffers[-1].append(name)
        filled += numel
    buckets: list[Bucket] = []
    for buffer in buffers:
        groups: dict[tuple[Scheme, str, str], list[Segment]] = {}
        for name in buffer:
            bucket, segment = known[name]
            groups.setdefault((bucket.scheme, bucket.device, bucket.dtype), []).append(segment)
        for (scheme, device, dtype), segments in groups.items():
            owned = sharded and scatters(scheme, dense)
            direction = known[segments[0].name][0].direction
            bucket = Bucket(
                scheme, tuple(segments), device, dtype, sharded=owned, host_scatters=dense, direction=direction
            )
            buckets.append(bucket)
    return Plan(tuple(buckets), plan.rows)
