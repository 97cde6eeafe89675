"""8-bit floats under a scale per block."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from ..codecs import Cast, Codec
from .base import Block, Scheme
from .registry import register


@register
class Fp8(Scheme):
    """e4m3 values with one fp32 scale (absmax / 448) per block on the wire, fp32 sum.

    Rounded to nearest even on both ways, without error feedback.
    """

    name: ClassVar[str] = "fp8"
    paper: ClassVar[str] = "Peng et al., 2023, arXiv 2310.18313"

    block: Block = Field(256, description="elements that share a scale")

    @property
    def codec(self) -> Codec:
        return Cast("fp8", self.block)
