"""EF-signSGD: scaled signs with error feedback."""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import Field

from ..codecs import Codec, Sign
from ..core.memory import ERROR_FEEDBACK, Memory
from .base import Scheme
from .registry import register


@register
class EFSignSGD(Scheme):
    """Sends sign(p) and mean|p|, remembers the rest.

    The mean is taken per block rather than per layer: layers of one bucket keep their own size, and the kernel stays
    one pass. Memory is in gradient units (the learning rate is applied by the optimizer, after the average).

    Departure from the paper: rows that are zero on every rank, gradient and memory, stay zero (`says_zero`). A sign
    alone would move an embedding's unused row, or a layer that was not called, by the scale of its block.
    """

    name: ClassVar[str] = "ef_signsgd"
    paper: ClassVar[str] = "Karimireddy et al., 2019, arXiv 1901.09847"

    block: Annotated[int, Field(ge=32, multiple_of=32)] = Field(1024, description="elements that share a scale")

    @property
    def says_zero(self) -> bool:
        return False

    @property
    def memory(self) -> Memory | None:
        return ERROR_FEEDBACK

    @property
    def codec(self) -> Codec:
        return Sign(self.block)
