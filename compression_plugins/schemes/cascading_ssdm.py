"""Cascading SSDM: a ring whose every hop decodes, adds and draws signs again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

from .._lazy import torch
from ..collectives import even_shards, ring_fold
from ..core.call import Call, Reduction, Segment, total
from ..core.streams import Purpose, of
from .base import Scheme
from .registry import register
from .ssdm import StochasticSign

if TYPE_CHECKING:
    from torch import Tensor

_CODEC = StochasticSign()


@register
class CascadingSSDM(Scheme):
    """What becomes of SSDM in a multi-hop all-reduce: a control that shows why hops must not compress again.

    Reduce phase: a rank decodes the partial sum that it receives, adds its own segment, and sends stochastic signs of
    the sum under the sum's norm. Gather phase: the last messages go round as they are; all ranks decode the same bytes.
    Unbiased, but a decoded message is sqrt(d/n) times as long as what it encodes, so n hops in a row make the error
    grow like (d/n)^(n/2), and the norm may leave the range of fp32, where it stops (3.4028e38). Not for training beyond
    a few ranks.

    Wire: 2 (n - 1) hops of one bit per element of a segment of ceil(d / 32n) words, and a norm.
    Rows that are zero on every rank stay zero (`says_zero`).
    """

    name: ClassVar[str] = "cascading_ssdm"
    paper: ClassVar[str] = "Wu et al., 2022, arXiv 2204.06787 (control)"
    suits_adam: ClassVar[bool] = False

    @property
    def says_zero(self) -> bool:
        return False

    def mean(self, x: Tensor, call: Call) -> Reduction:
        size, rank = call.transport.size, call.transport.rank
        shards = even_shards(x.numel(), size, _CODEC.block)
        length = _CODEC.nbytes(max(shards))

        def encode(values: Tensor, hops: int) -> Tensor:
            """Messages are as long as the longest segment's, for neighbours exchange equal lengths."""
            key = of(call.key, Purpose.RELAY, hops)
            message = torch.zeros(length, dtype=torch.uint8, device=x.device)
            _CODEC.encode(values, key, out=message[: _CODEC.nbytes(values.numel())])
            return message

        def merge(received: Tensor, own: Tensor, hops: int, _: int) -> Tensor:
            partial = received[: _CODEC.nbytes(own.numel())]
            return encode(_CODEC.decode(partial, own.numel(), out=own, accumulate=True), hops)

        parts = list(x.split(shards))
        parts[rank] = encode(parts[rank], 0)
        messages = yield from ring_fold(call.transport, parts, merge)
        for message, out in zip(messages, x.split(shards)):
            _CODEC.decode(message[: _CODEC.nbytes(out.numel())], out.numel(), out=out, weight=1 / size)
        return x

    def wire_bits(self, segments: Sequence[Segment], size: int) -> float:
        return 2 * (size - 1) * _CODEC.payload_bits(max(even_shards(total(segments), size, _CODEC.block)))
