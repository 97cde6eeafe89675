"""Marsit: one bit per element on every hop."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field, ValidationInfo, field_validator

from .. import triton_kernels as K
from .._lazy import torch
from ..collectives import dense_mean, ring_fold, square_rows, torus_fold
from ..core.call import Call, Program, Reduction, Segment, total
from ..core.memory import ERROR_FEEDBACK, Memory, Vector, finite, nan_unless, zero_unless
from ..core.streams import Purpose, of
from ..errors import UnsupportedError
from .base import Scheme
from .registry import register

if TYPE_CHECKING:
    from torch import Tensor


@register
class Marsit(Scheme):
    """Signs that merge at random, so that a merged bit is a fair draw from the ranks' signs, and a full-precision
    flush.

    Every `flush_steps` steps the compensated gradients are averaged exactly and the memory empties. In between each bit
    of the update is the sign of one rank chosen uniformly, times `eta_s`; the memory is the difference to that
    *aggregated* update. Three forms draw from the same law: `ring` (the paper's operator, hop by hop), `torus` (the
    same along rows, then columns: fewer hops) and `one_hot` (each rank keeps only the bits that a shared random key
    assigns to it; words are then summed by an ordinary all-reduce, no carry can occur). They send the same bytes.

    The general key `direction: momentum` or `adam` puts the optimizer before the compression, where the paper has it.

    Departures from the paper. The memory is in units of what is averaged: the optimizer applies its learning rate after
    the average. The paper's step `eta_s` is one constant; `auto` sets it per tensor at each flush to the ranks' mean
    |p|, which all ranks learn with the flush itself, because gradients of different layers differ in size by orders of
    magnitude. A tensor whose p was zero there, as everything before a layer that starts at zero, has no scale yet: it
    is taken anew 1, 2, 4, 8, 16, 24, ... rounds after the flush, by an all-reduce of one mean per tensor. Rows of p
    that are zero on every rank stay zero, which bits alone cannot say (`says_zero`). A rank whose gradient is not
    finite raises a flag in the same message, and every rank's result is NaN.
    """

    name: ClassVar[str] = "marsit"
    paper: ClassVar[str] = "Wu et al., 2022, arXiv 2204.06787"
    suits_adam: ClassVar[bool] = False

    flush_steps: Annotated[int, Field(ge=1, le=10**9)] = Field(100, description="steps between exact averages (K)")
    eta_s: Annotated[float, Field(gt=0, le=1e30)] | Literal["auto"] = Field(
        "auto", description="absolute value of the update between flushes; auto: each tensor's mean |p| at the flush"
    )
    form: Literal["one_hot", "ring", "torus"] = Field(
        "one_hot", description="one all-reduce of words, or the paper's ring or torus"
    )
    rows: Annotated[int, Field(ge=1, le=65536)] | Literal["auto"] = Field(
        "auto", description="rows of the torus, a divisor of the number of ranks; auto: nearest to a square"
    )

    @field_validator("rows")
    @classmethod
    def _is_used(cls, value: Any, info: ValidationInfo) -> Any:
        """A key that another key makes meaningless may only have its default."""
        if value != "auto" and info.data.get("form", "torus") != "torus":
            raise ValueError(f"only form: torus has it, not form: {info.data['form']}")
        return value

    @property
    def memory(self) -> Memory | None:
        return ERROR_FEEDBACK if self.flush_steps > 1 else None

    @property
    def says_zero(self) -> bool:
        return self.memory is None

    def check_ranks(self, size: int) -> None:
        if self.form == "torus" and self.rows != "auto" and size % self.rows:
            valid = [rows for rows in range(1, size + 1) if size % rows == 0]
            best = min(valid, key=lambda rows: abs(rows - int(self.rows)))
            raise UnsupportedError(
                f"marsit: a torus of rows: {self.rows} cannot be made of {size} ranks, which it does not divide; the "
                f"nearest that does is rows: {best} (valid: {', '.join(map(str, valid))}, or auto)"
            )

    def mean(self, x: Tensor, call: Call) -> Reduction:
        if self.memory is None:
            return (yield from dense_mean(call, x))
        healthy, residual = finite(x), call.residual()
        etas = [call.state.tensor("eta", segment.name, lambda: self._first_eta(x)) for segment in call.segments]
        since = call.clock.round % self.flush_steps
        if since == 0:  # so the first round, which `eta_s: auto` needs
            return (yield from self._flush(x, residual, etas, call))
        vote = self._one_hot if self.form == "one_hot" else self._hop_by_hop
        bits, healthy = yield from vote(zero_unless(healthy, x), residual, healthy, call)
        if self._awaits_scales(since):
            yield from self._scale(residual.new, healthy, etas, call)
        return _apply(bits, healthy, residual.new, etas, call, x)

    @property
    def period(self) -> int:
        return 1 if self.memory is None else self.flush_steps

    def wire_bits(self, segments: Sequence[Segment], size: int) -> float:
        numel = total(segments)
        if self.memory is None:
            return 64 * numel * (size - 1) / size
        words = -(-numel // 32) if self.form == "one_hot" else size * -(-numel // (32 * size))
        flush = 1 / self.flush_steps
        late = sum(map(self._awaits_scales, range(1, self.flush_steps))) / self.flush_steps
        # A flag goes with the signs, and with the flush a mean of each tensor.
        votes, dense = words + 1, numel + len(segments)
        return 2 * (size - 1) / size * 32 * (votes * (1 - flush) + dense * flush + len(segments) * late)

    def _flush(self, x: Tensor, residual: Vector, etas: list[Tensor], call: Call) -> Reduction:
        """Exact average of p; each tensor's mean |p| travels with it."""
        p = ERROR_FEEDBACK.compensate(x, residual)
        means = _means(p, call)
        total = yield call.transport.all_reduce(torch.cat([p, means]))
        result, means = total.div_(call.transport.size).split([x.numel(), len(means)])
        healthy = finite(result)
        residual.new.copy_(residual.old.where(~healthy, 0))
        if self.eta_s == "auto":
            for eta, mean in zip(etas, means):
                eta[0].copy_(mean.where(healthy, eta[0]))
                eta[1].copy_(eta[0] == 0)
        return result

    def _awaits_scales(self, since: int) -> bool:
        """Is this one of the rounds after a flush in which tensors that were zero there may get their scale?"""
        return self.eta_s == "auto" and (since in (1, 2, 4) or since % 8 == 0)

    def _scale(self, p: Tensor, healthy: Tensor, etas: list[Tensor], call: Call) -> Program[None]:
        """Mean |p| of the tensors whose gradient was zero at the flush, as everything before a layer is that starts at
        zero. One scale would hold until the next flush and be that of the first small gradient, so it is taken several
        times. The other tensors keep theirs.
        """
        waits = [not eta.is_cpu or bool(eta[1]) for eta in etas]  # of the flush's sums, so the same on every rank
        means = yield call.transport.all_reduce(_means(p, call, waits))
        for eta, mean in zip(etas, means.div_(call.transport.size)):
            eta[0].copy_(mean.where(healthy & (eta[1] > 0), eta[0]))

    def _first_eta(self, x: Tensor) -> Tensor:
        """The scale, and whether it is still to be found (1) or stands until the flush (0)."""
        return x.new_tensor([0.0, 1.0] if self.eta_s == "auto" else [self.eta_s, 0.0])

    def _one_hot(self, x: Tensor, residual: Vector, mine: Tensor, call: Call) -> Program[tuple[Tensor, Tensor]]:
        """Per coordinate one rank, drawn by a key that all share, gives its sign; all-reduce of int32 words."""
        transport = call.transport
        bits = K.one_hot_signs(x, transport.rank, transport.size, call.key._replace(rank=0), **residual.arguments())
        flag = (~mine).to(torch.int32).view(1)
        total = yield transport.all_reduce(torch.cat([bits.view(torch.int32), flag]))
        return total[:-1].contiguous().view(torch.uint8), total[-1] == 0

    def _hop_by_hop(self, x: Tensor, residual: Vector, mine: Tensor, call: Call) -> Program[tuple[Tensor, Tensor]]:
        """The paper's reduce and gather phases over packed bits; an aggregate wins with its share of the ranks.

        Every hop has a random stream of its own, and every rank a key. Padding ends with the bits: no lane beyond the
        last element is ever decoded.
        """
        transport, size = call.transport, call.transport.size
        unhealthy = yield transport.all_reduce((~mine).to(torch.float32).view(1))
        bits = K.sign_bits(x, **residual.arguments())
        length = 4 * -(-len(bits) // (4 * size))
        padded = bits.new_zeros(length * size)
        padded[: len(bits)] = bits
        parts = [padded[rank * length : (rank + 1) * length] for rank in range(size)]

        def merge(received: Tensor, own: Tensor, a: int, b: int) -> Tensor:
            return self._join(received, own, a, b, of(call.key, Purpose.MERGE, a))

        if self.form == "ring":
            parts = yield from ring_fold(transport, parts, merge)
        else:
            rows = square_rows(size) if self.rows == "auto" else self.rows
            parts = yield from torus_fold(transport, parts, rows, merge)
        return torch.cat(parts)[: len(bits)], unhealthy[0] == 0

    def _join(self, received: Tensor, own: Tensor, a: int, b: int, key: K.Key) -> Tensor:
        """Bits of `a` ranks and of `b`: where they differ, the received ones win with probability a / (a + b)."""
        return K.bit_merge(received, own, a, b, key)


def _means(p: Tensor, call: Call, wanted: Sequence[bool] | None = None) -> Tensor:
    """Mean |p| of each tensor, fp32 [segments]; 0 in the place of those that are not wanted, which are not read."""
    parts = p.split([segment.numel for segment in call.segments])
    wanted = wanted or [True] * len(parts)
    means = [part.abs().mean() if want else p.new_zeros(()) for part, want in zip(parts, wanted)]
    return torch.stack(means) if means else p.new_empty(0)


def _apply(bits: Tensor, healthy: Tensor, residual: Tensor, etas: list[Tensor], call: Call, out: Tensor) -> Tensor:
    """+-eta for every bit, and the compensation: the memory, which holds p, loses the aggregated update."""
    steps = torch.stack([eta[0] for eta in etas]) * healthy  # nothing at all where some rank is unhealthy
    result = K.signs_expand_each(bits, steps, [segment.numel for segment in call.segments], residual, out)
    return nan_unless(healthy, result)
