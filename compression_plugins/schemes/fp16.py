"""IEEE half precision on the wire, fp32 sum."""

from __future__ import annotations

from typing import ClassVar

from ..codecs import Cast, Codec
from .base import Scheme
from .registry import register


@register
class Fp16(Scheme):
    """IEEE half precision on the wire, fp32 sum.

    Each value is rounded to nearest even twice, once on its way to the rank that adds it up in fp32 and once on the way
    back; the sum itself never loses digits or overflows in the short format.
    """

    name: ClassVar[str] = "fp16"
    paper: ClassVar[str] = "-"

    @property
    def codec(self) -> Codec:
        return Cast("fp16")
