"""EF-signSGD: scaled signs with error feedback."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from ..codecs import Codec, Sign
from ..core.memory import Memory
from .base import Block, Scheme
from .registry import register

if TYPE_CHECKING:
    from ..collectives import Collective


@register
class EFSignSGD(Scheme):
    """Sends sign(p) and mean|p|, remembers the rest.

    In two stages the owner of a shard averages what it gets, codes the mean in the same way and remembers
    what that takes away, as DoubleSqueeze does (Tang et al., 2019, arXiv 1905.05957): 2(n-1)/n bits a value instead of
    n-1 from each of n ranks. With `stages: auto` two ranks, and buckets so short that a round costs more than the bits,
    take one stage; with `stages: 2` two ranks only.
    What is coded twice comes later: learning rates that one stage just bears may be too large for two.
    A `decay` below 1 lets what is remembered fade (p = g + decay r); it is not in the paper.

    The mean is taken per block rather than per layer: layers of one bucket keep their own size, and the kernel stays
    one pass. Memory is in gradient units (the learning rate is applied by the optimizer, after the average).

    Departure from the paper: rows that are zero on every rank, gradient and memory, stay zero (`says_zero`). A sign
    alone would move an embedding's unused row, or a layer that was not called, by the scale of its block.
    """

    name: ClassVar[str] = "ef_signsgd"
    paper: ClassVar[str] = "Karimireddy et al., 2019, arXiv 1901.09847"
    suits_adam: ClassVar[bool] = False

    block: Block = Field(1024, description="elements that share a scale")
    stages: Literal["auto", 1, 2] = Field(
        "auto", description="1: all get all signs; 2: owners code the mean, where that sends less; auto: the faster one"
    )
    decay: Annotated[float, Field(gt=0, le=1)] = Field(1.0, description="of what is remembered, kept at each step")

    @property
    def says_zero(self) -> bool:
        return False

    @property
    def memory(self) -> Memory | None:
        return Memory(alpha=self.decay, decay=self.decay)

    @property
    def collective(self) -> Collective:
        from ..collectives import ALWAYS_TWO_STAGE, GATHER, TWO_STAGE

        return {"auto": TWO_STAGE, 1: GATHER, 2: ALWAYS_TWO_STAGE}[self.stages]

    @property
    def codec(self) -> Codec:
        return Sign(self.block)
