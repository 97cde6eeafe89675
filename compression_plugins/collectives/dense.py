"""The average of the values themselves, without a codec."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..codecs import Cast
from .payloads import two_stage

if TYPE_CHECKING:
    from torch import Tensor

    from ..core.call import Call, Reduction


def dense_mean(call: Call, x: Tensor) -> Reduction:
    """All-reduce of the values themselves, in their own dtype, then the mean. Also the way of payloads that sum.

    A transport that cannot sum bfloat16 exchanges the values as they are and sums in fp32: the exact mean,
    rounded once.
    """
    if call.transport.sums(x.dtype):
        total = yield call.transport.all_reduce(x)
        return total.div_(call.transport.size)
    mean = yield from two_stage(Cast("bf16"), None, call, x.float())
    return x.copy_(mean)
