"""All-gather of every rank's payload."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .two_stage import reduce_scatter

if TYPE_CHECKING:
    from torch import Tensor

    from ..codecs import Codec
    from ..memories import Memory
    from ..schemes.base import Call, Reduction


def gather(codec: Codec, memory: Memory | None, call: Call, x: Tensor) -> Reduction:
    """Everyone decodes everyone's message: one rounding and exact error feedback, at (n-1)·b bits an element."""
    if call.shards is not None:
        return (yield from reduce_scatter(codec, memory, call, x))
    payload = codec.encode(x, call.key, memory, call.residual() if memory else None)
    payloads = yield call.transport.all_gather(payload)
    return codec.average(payloads, x.numel(), x)
