"""Zeros beside a code that has no word for them.

A sign is + or -, so a row of an embedding that nobody looked up, or a layer that was not called, would move by a whole
scale. Each rank therefore marks the rows of its gradient that are zero, one bit for each row, in a message beside the
scheme's own. Rows that are zero on every rank stay zero, and leave no trace in the residual.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from .. import triton_kernels as K
from ..core.call import Call, Reduction, Segment
from ..core.memory import Vector
from ..schemes.base import Scheme

_SAMPLE = 8  # elements of a row that are looked at first, spread over it: the first ones may be the margin of images


@lru_cache(maxsize=4096)
def rows_of(segments: tuple[Segment, ...]) -> tuple[tuple[int, int, int], ...]:
    """(start in the bucket, number, length) of equal rows, which cover the bucket. A tensor of fewer than two
    dimensions is one row; rows that a piece of a parameter cuts are rows of their own.
    """
    found: list[tuple[int, int, int]] = []
    position = 0
    for segment in segments:
        width, left = segment.row or segment.numel, segment.numel
        head = min(left, -segment.start % width) if segment.row else 0
        for number, length in ((1, head), ((left - head) // width if width else 0, width)):
            if number and length:
                found.append((position, number, length))
                position += number * length
                left -= number * length
        if left:
            found.append((position, 1, left))
            position += left
    return tuple(found)


def marks_bits(segments: Sequence[Segment], size: int) -> float:
    """Bits that each of `size` ranks sends for its marks."""
    rows = sum(number for _, number, _ in rows_of(tuple(segments)))
    return (size - 1) * 32 * -(-rows // 32)


def averaged(scheme: Scheme, x: Tensor, call: Call) -> Reduction:
    """The scheme's own program, with marks of zeros where its code has no word for them."""
    program = scheme.mean(x, call) if call.shards is None else scheme.scatter_mean(x, call)
    if not scheme.says_zero:
        program = marked(program, x, call, call.residual() if scheme.memory else None)
    return (yield from program)


def marked(program: Reduction, x: Tensor, call: Call, residual: Vector | None) -> Reduction:
    """`program`, a scheme's reduction of `x`, with zeros where all ranks have them.

    Args:
        residual: what the scheme remembers of the bucket, if it does.
    """
    rows = rows_of(tuple(call.segments))
    mine = _zero_rows(x, residual.old if residual else None, rows)
    handle = call.transport.all_gather(K.pack_bits(mine.to(torch.int32), 1))
    result = yield from program
    votes = yield handle
    common = votes[0]
    for vote in votes[1:]:
        common = common & vote
    zero = K.unpack_bits(common.contiguous(), len(mine), 1).bool()
    if zero.is_cpu and not zero.any():
        return result
    first = 0
    for start, count, length in rows:
        dead = zero[first : first + count]
        places = dead.nonzero().flatten() if dead.is_cpu else None  # few as a rule; a GPU would have to be waited for
        for flat in (result, residual.new if residual else None):
            if flat is not None:
                block = flat[start : start + count * length].view(count, length)
                block.masked_fill_(dead.view(count, 1), 0) if places is None else block.index_fill_(0, places, 0)
        first += count
    return result


def _zero_rows(x: Tensor, residual: Tensor | None, rows: Sequence[tuple[int, int, int]]) -> Tensor:
    """bool [rows]: which rows of the gradient and of the residual are zero. On a CPU a few elements of a row spare
    most rows a closer look.
    """
    found = []
    for start, count, length in rows:
        blocks = [
            flat[start : start + count * length].view(count, length) for flat in (x, residual) if flat is not None
        ]
        if not x.is_cpu:
            found.append(torch.stack([(block == 0).all(1) for block in blocks]).all(0))
            continue
        zero = blocks[0][:, length // 2] == 0  # of each row one cache line
        found.append(zero)
        if not zero.any():
            continue
        samples = [block[:, :: max(1, length // _SAMPLE)] for block in blocks]
        for part in (*samples, *blocks):
            places = zero.nonzero().flatten()
            zero[places] = (part[places] == 0).all(1)
    return torch.cat(found)
