"""Marsit: one bit an element on every hop."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from .. import triton_kernels as K
from ..memories import Memory, finite, zero_unless
from ..registry import register
from .base import Call, Phases, Reduction, Scheme, Segment, total

if TYPE_CHECKING:
    from torch import Tensor

_GLOBAL = Memory(scope="global")
_MERGES = 1 << 16  # random streams of the ring's merges, apart from those that adapters count in


@register
class Marsit(Scheme):
    """Signs that merge at random, so that a merged bit is a fair draw from the ranks' signs, and a full-precision
    flush.

    Every `flush_steps` steps the compensated gradients are averaged exactly and the memory empties. In between each bit
    of the update is the sign of one rank chosen uniformly, times `eta_s`; the memory is the difference to that
    *aggregated* update. Two forms draw from the same law: `one_hot` (each rank keeps only the bits that a shared random
    key assigns to it; words are then summed by an ordinary all-reduce, no carry can occur) and `ring` (the paper's
    operator, hop by hop).

    Departures from the paper. The memory is in gradient units: the optimizer applies its learning rate, and momentum,
    after the average. The paper's step `eta_s` is one constant; `auto` sets it per tensor at each flush to the ranks'
    mean |p|, which all ranks learn with the flush itself, because gradients of different layers differ in size
    by orders of magnitude. A rank whose gradient is not finite raises a flag in the same message, and every rank's
    result is NaN.
    """

    name: ClassVar[str] = "marsit"
    paper: ClassVar[str] = "Wu et al., 2022, arXiv 2204.06787"

    flush_steps: Annotated[int, Field(ge=1)] = Field(100, description="steps between exact averages (K)")
    eta_s: Annotated[float, Field(gt=0)] | Literal["auto"] = Field(
        "auto", description="absolute value of the update between flushes; auto: each tensor's mean |p| at the flush"
    )
    form: Literal["one_hot", "ring"] = Field("one_hot", description="one all-reduce of words, or the paper's ring")

    @property
    def memory(self) -> Memory | None:
        return _GLOBAL

    def reduce(self, x: Tensor, call: Call) -> Reduction:
        residual = call.residual()
        etas = [call.state("eta", segment.name, lambda: self._first_eta(x)) for segment in call.segments]
        if call.step % self.flush_steps == 0:
            return (yield from self._flush(x, residual, etas, call))
        healthy = finite(x)
        vote = _one_hot if self.form == "one_hot" else _ring
        bits, healthy = yield from vote(zero_unless(healthy, x), residual, healthy, call)
        return _apply(bits, healthy, residual, etas, call, x)

    def _flush(self, x: Tensor, residual: Tensor, etas: list[Tensor], call: Call) -> Reduction:
        """Exact average of p; each tensor's mean |p| travels with it."""
        import torch

        p = _GLOBAL.compensate(x, residual)
        sizes = [segment.numel for segment in call.segments]
        means = torch.stack([part.abs().mean() for part in p.split(sizes)]) if sizes else p.new_empty(0)
        total = yield call.transport.all_reduce(torch.cat([p, means]))
        result, means = total.div_(call.transport.size).split([x.numel(), len(sizes)])
        healthy = finite(result)
        residual.copy_(residual.where(~healthy, 0))
        if self.eta_s == "auto":
            for eta, mean in zip(etas, means):
                eta.copy_(mean.where(healthy, eta))
        return result

    def _first_eta(self, x: Tensor) -> Tensor:
        return x.new_full((), 0.0 if self.eta_s == "auto" else self.eta_s)

    def wire_bits(self, segments: Sequence[Segment], size: int) -> float:
        numel = total(segments)
        words = -(-numel // 32) if self.form == "one_hot" else size * -(-numel // (32 * size))
        flush = 1 / self.flush_steps
        votes, dense = (
            words + 1,
            numel + len(segments),
        )  # a flag goes with the signs, a mean of each tensor with the flush
        return 2 * (size - 1) / size * 32 * (votes * (1 - flush) + dense * flush)


def _apply(bits: Tensor, healthy: Tensor, residual: Tensor, etas: list[Tensor], call: Call, out: Tensor) -> Tensor:
    """+-eta for every bit, and the compensation: the memory, which holds p, loses the aggregated update."""
    import torch

    result = K.signs_expand(bits, residual.numel(), 1.0, out=out)
    pieces = list(result.split([segment.numel for segment in call.segments]))
    torch._foreach_mul_(pieces, [eta * healthy for eta in etas])  # nothing at all where some rank is unhealthy
    residual.sub_(result)
    return result.mul_(torch.where(healthy, 1.0, torch.nan))


def _one_hot(x: Tensor, residual: Tensor, mine: Tensor, call: Call) -> Phases[tuple[Tensor, Tensor]]:
    """Per coordinate one rank, drawn by a key that all share, gives its sign; all-reduce of int32 words."""
    import torch

    transport = call.transport
    bits = K.one_hot_signs(x, transport.rank, transport.size, call.key._replace(rank=0), residual=residual)
    flag = (~mine).to(torch.int32).view(1)
    total = yield transport.all_reduce(torch.cat([bits.view(torch.int32), flag]))
    return total[:-1].contiguous().view(torch.uint8), total[-1] == 0


def _ring(x: Tensor, residual: Tensor, mine: Tensor, call: Call) -> Phases[tuple[Tensor, Tensor]]:
    """The paper's reduce and gather phases over packed bits; the received aggregate wins with its share of the
    ranks.
    """
    import torch

    from ..collectives import ring_fold

    transport, key = call.transport, call.key
    unhealthy = yield transport.all_reduce((~mine).to(torch.float32).view(1))
    bits = K.sign_bits(x, residual=residual)
    length = 4 * -(-len(bits) // (4 * transport.size))
    padded = bits.new_zeros(length * transport.size)
    padded[: len(bits)] = bits

    def merge(received: Tensor, own: Tensor, hops: int) -> Tensor:
        return K.bit_merge(received, own, hops, 1, key._replace(stream=key.stream + _MERGES * hops))

    parts = yield from ring_fold(transport, list(padded.split(length)) if length else [padded] * transport.size, merge)
    return torch.cat(parts)[: len(bits)], unhealthy[0] == 0
