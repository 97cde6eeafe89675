"""How the ranks of a node share out a bucket: an equal part of every tensor each."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..core.call import Segment

#: Rows of a part below which a matrix is cut anywhere: filling up whole rows would then cost more than their shape is
#: worth to the methods that look at it.
_ROWS = 8


def part_of(segment: Segment, node: int, index: int) -> Segment:
    """The part of a tensor that the rank number `index` of `node` ranks owns; whole rows, where these are many. The
    last parts may end behind the tensor's last element.
    """
    rows = segment.numel // segment.row if segment.row and segment.shape is not None else 0
    if rows < _ROWS * node:
        length = -(-segment.numel // node)
        return Segment(segment.name, segment.start + index * length, length, None, segment.row)
    many = -(-rows // node)
    shape = many, *segment.shape[1:]  # type: ignore[index]
    return Segment(segment.name, segment.start + index * many * segment.row, many * segment.row, shape, segment.row)


def dealt(segments: Sequence[Segment], lengths: Sequence[int], x: Tensor, node: int) -> Tensor:
    """The parts of the bucket, one behind the other in the order of their owners: flat [node * sum(lengths)]."""
    parts, place, start = x.new_zeros(node, sum(lengths)), 0, 0
    for segment, length in zip(segments, lengths):
        full = segment.numel // length if length else 0
        flat = x[start : start + segment.numel]
        parts[:full, place : place + length] = flat[: full * length].view(full, length)
        if rest := segment.numel - full * length:
            parts[full, place : place + rest] = flat[full * length :]
        place, start = place + length, start + segment.numel
    return parts.view(-1)


def collect(segments: Sequence[Segment], lengths: Sequence[int], parts: Tensor, out: Tensor) -> None:
    """The opposite, from [node, sum(lengths)] into `out`."""
    place, start = 0, 0
    for segment, length in zip(segments, lengths):
        full = segment.numel // length if length else 0
        flat = out[start : start + segment.numel]
        flat[: full * length].view(full, length).copy_(parts[:full, place : place + length])
        if rest := segment.numel - full * length:
            flat[full * length :] = parts[full, place : place + rest]
        place, start = place + length, start + segment.numel
