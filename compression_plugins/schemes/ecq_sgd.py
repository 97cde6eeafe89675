"""ECQ-SGD: few bits per value, with error feedback."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from ..codecs import Codec, Uniform
from ..core.memory import Memory
from .base import Block, Scheme
from .registry import register

if TYPE_CHECKING:
    from torch import Tensor

    from ..collectives import Collective
    from ..core.call import Call, Reduction
    from ..core.clock import Clock


@register
class ECQSGD(Scheme):
    """Values are rounded to one of 2^(bits-1) - 1 levels of their block's largest; what that takes away is remembered.

    p = g + alpha r is coded as q, and r <- beta r + g - q. In two stages (`stages`, as of `ef_signsgd`) the owner of a
    shard remembers what coding the mean takes away, so that traffic does not grow with the number of ranks.

    alpha below 1 with beta 1 is the memory of LoCo (Xie et al., 2024, arXiv 2407.04480): with e = alpha r, what is
    coded is g + e, and e <- (1 - alpha) e + alpha (g + e - q). Its `err_beta` is 1 - alpha, its `reset_T` here
    `reset_steps`.

    Departures from the paper. It rounds at random, so that a message is unbiased; with a memory the nearest level
    (`rounding: nearest`, the default) loses half as much, and nothing for good. And alpha and beta are 1 by default,
    plain error feedback, which forgets nothing.
    """

    name: ClassVar[str] = "ecq_sgd"
    paper: ClassVar[str] = "Wu et al., 2018, arXiv 1806.08054"

    bits: Literal[2, 4, 8] = Field(4, description="bits per value, sign included")
    block: Block = Field(256, description="elements that share a scale")
    rounding: Literal["nearest", "stochastic"] = Field("nearest", description="stochastic is the paper's")
    alpha: Annotated[float, Field(gt=0, le=1)] = Field(
        1.0, description="part of the memory that is added to a gradient"
    )
    beta: Annotated[float, Field(gt=0, le=1)] = Field(1.0, description="part of the memory that is kept at each step")
    reset_steps: Annotated[int, Field(ge=0, le=10**9)] = Field(
        0, description="steps after which all that is remembered is forgotten, as LoCo does it; 0: never"
    )
    stages: Literal["auto", 1, 2] = Field(
        "auto", description="1: all get all codes; 2: owners code the mean, where that sends less; auto: the faster one"
    )

    @property
    def memory(self) -> Memory | None:
        return Memory(alpha=self.alpha, decay=self.beta)

    @property
    def collective(self) -> Collective:
        from ..collectives import ALWAYS_TWO_STAGE, GATHER, TWO_STAGE

        return {"auto": TWO_STAGE, 1: GATHER, 2: ALWAYS_TWO_STAGE}[self.stages]

    def _memory_at(self, clock: Clock) -> Memory | None:
        due = self.reset_steps and clock.round and not clock.round % self.reset_steps and not clock.micro_batch
        return Memory(alpha=0.0, decay=0.0) if due else self.memory

    def mean(self, x: Tensor, call: Call) -> Reduction:
        return (yield from self.collective.mean(self.codec, self._memory_at(call.clock), call, x))

    def scatter_mean(self, x: Tensor, call: Call) -> Reduction:
        from ..collectives import scatter_mean

        return (yield from scatter_mean(self.codec, self._memory_at(call.clock), call, x))

    @property
    def codec(self) -> Codec:
        return Uniform(self.bits, self.block, "absmax", self.rounding)
