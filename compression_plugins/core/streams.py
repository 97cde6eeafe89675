"""The random streams of a reduction. Draws that could meet under one key are told apart here and nowhere else.

A stream is a 32-bit number: four bits of purpose, sixteen of micro-batch, twelve of hop. Seed, bucket, step and rank
stand in other words of the key (`triton_kernels.philox.Key`).
"""

from __future__ import annotations

from enum import IntEnum
from typing import TYPE_CHECKING

from ..errors import CompressionError

if TYPE_CHECKING:
    from ..triton_kernels import Key

_MICRO_BATCHES, _HOPS = 1 << 16, 1 << 12


class Purpose(IntEnum):
    """What a draw is for; each has streams of its own."""

    ENCODE = 0  #: a rank's own message
    OWNER = 1  #: the average that the owner of a shard encodes again
    MERGE = 2  #: aggregates that meet on a hop
    RELAY = 3  #: a partial sum that is encoded again on a hop
    WEIGHTS = 4  #: parameters, not gradients


def stream(purpose: Purpose, micro_batch: int = 0, hop: int = 0) -> int:
    """The number of a stream.

    Args:
        micro_batch: reductions of the bucket before this one within the step, below 65,536.
        hop: of a ring, or ranks in an aggregate, below 4,096.

    Raises:
        CompressionError: either is out of range, so that draws would be used twice.
    """
    if not 0 <= micro_batch < _MICRO_BATCHES:
        raise CompressionError(f"a step may reduce a bucket {_MICRO_BATCHES:,} times, not {micro_batch + 1:,}")
    if not 0 <= hop < _HOPS:
        raise CompressionError(f"a ring may have {_HOPS:,} ranks, not {hop + 1:,}")
    return int(purpose) << 28 | micro_batch << 12 | hop


def of(key: Key, purpose: Purpose, hop: int = 0) -> Key:
    """`key`, which is that of a rank's own message, for another purpose within the same reduction."""
    return key._replace(stream=stream(purpose, key.stream >> 12 & _MICRO_BATCHES - 1, hop))
