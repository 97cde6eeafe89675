"""The uncompressed average."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from ..core.call import Call, Reduction


def dense_mean(call: Call, x: Tensor) -> Reduction:
    """All-reduce of the values themselves, in their own dtype, then the mean. Also the way of payloads that sum."""
    total = yield call.transport.all_reduce(x)
    return total.div_(call.transport.size)
