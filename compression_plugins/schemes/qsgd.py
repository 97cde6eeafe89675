"""QSGD: unbiased stochastic quantization."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from ..codecs import Codec, Uniform
from .base import Block, Scheme
from .registry import register


@register
class QSGD(Scheme):
    """Each value is rounded at random to one of 2^(bits-1) - 1 levels of its block's norm, so that the mean is exact.

    The paper scales by the Euclidean norm; `norm: absmax`, the default, has levels that reach no further than the
    largest value, which at these block sizes makes the error many times smaller, and is unbiased all the same.
    Codes have a fixed width; the paper's variable-length code of the levels is not used.
    """

    name: ClassVar[str] = "qsgd"
    paper: ClassVar[str] = "Alistarh et al., 2017, arXiv 1610.02132"

    bits: Literal[2, 4, 8] = Field(4, description="bits per value, sign included")
    block: Block = Field(512, description="elements that share a scale")
    norm: Literal["absmax", "l2"] = Field("absmax", description="scale of a block; l2 is the paper's")

    @property
    def codec(self) -> Codec:
        return Uniform(self.bits, self.block, self.norm, "stochastic")
