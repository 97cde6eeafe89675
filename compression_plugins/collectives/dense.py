"""The uncompressed average."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from ..schemes.base import Call, Reduction


def dense_sum(call: Call, x: Tensor) -> Reduction:
    """All-reduce of the values themselves, then the mean. Also the way of every payload that may be summed."""
    total = yield call.transport.all_reduce(x)
    return total.div_(call.transport.size)
