"""Chunk-wise top-k in few bits, with a memory that may decay."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from .. import triton_kernels as K
from .._lazy import torch
from ..codecs import Cast, Codec, TwoMagnitudes, Uniform
from ..codecs.chunks import chunk_add, place_bits
from ..core.call import Call, Reduction, Segment, total
from ..core.memory import Memory
from .base import Block, Scheme
from .registry import register

if TYPE_CHECKING:
    from torch import Tensor


@register
class ChunkTopK(Scheme):
    """Every rank sends the largest of every `ratio` neighbours of its own, few bits of it, and its place.

    m <- decay m + g; q is the chosen values of m, coded; m <- m - q. So what coding takes away is remembered, too.

    Payload: places of ceil(log2 ratio) bits (at least 1), then the codes of the values: about (2 + log2 ratio) / ratio
    bits a value at `values: 2bit`, from each of the other ranks.

    The parts are SparseLoCo's: selection in chunks, values in two bits, a memory that decays (by 0.95 there). What
    differs: this is the reduction alone, of gradients or of whatever the host averages, without SparseLoCo's local
    steps. One value of each short chunk is kept, not many of a long one: places take fewer bits (theirs have 12), and
    one pass selects. And 2 bits are a sign and one of two magnitudes, means of a block's own (`TwoMagnitudes`; how the
    paper's two bits are rounded is not established here): the largest of neighbours are about of one size, and three
    levels up to the largest of all would code most of them as zero. Of their squares 1 % to 3 % is lost instead of 45 %
    to 77 % (Gaussian and Laplace values, 1 in 50). Rows that are zero on every rank stay zero (`says_zero`), for the
    code of two bits has no word for it.

    With `signs: true` the optimizer gets the sign of the mean, 0 where no rank has sent anything, as in DeMo (Peng et
    al., 2024, arXiv 2411.19870), which is this with plain SGD, `decay: 0.999`, and a cosine transform of each chunk
    that is not here: chunks are of the values themselves. The step is then as long as the learning rate says, and is
    no mean of gradients.
    """

    name: ClassVar[str] = "chunk_topk"
    paper: ClassVar[str] = "Sarfi et al., 2025, arXiv 2508.15706"
    suits_adam: ClassVar[bool] = False

    ratio: Annotated[int, Field(ge=1, le=65536)] = Field(50, description="keep one value in so many")
    values: Literal["2bit", "4bit", "8bit", "bf16"] = Field("2bit", description="format of the kept values on the wire")
    block: Block = Field(512, description="kept values that share a scale")
    decay: Annotated[float, Field(gt=0, le=1)] = Field(1.0, description="of what is remembered, kept at each step")
    signs: bool = Field(False, description="the optimizer gets the signs of the mean only")

    @property
    def says_zero(self) -> bool:
        return self.values != "2bit"

    @property
    def memory(self) -> Memory:
        return Memory(alpha=self.decay, decay=self.decay)

    def mean(self, x: Tensor, call: Call) -> Reduction:
        codec, width, residual = self._format(), place_bits(self.ratio), call.residual()
        indices, values = K.chunk_select(x, self.ratio, **self.memory.kernel_arguments(residual))
        kept, places = len(values), K.pack_bits(indices, width)
        codes = codec.encode(values, call.key)
        lost = values - codec.decode(codes, kept)
        chunk_add(indices, lost.nan_to_num_(0.0, 0.0, 0.0), self.ratio, residual.new)
        payloads = yield call.transport.all_gather(torch.cat([places, codes]))
        result, cut = x.zero_(), len(places)
        for row in payloads:
            decoded = codec.decode(row[cut:], kept, weight=1 / call.transport.size)
            chunk_add(K.unpack_bits(row[:cut], kept, width), decoded, self.ratio, result)
        return result.sign().where(~result.isnan(), result) if self.signs else result

    def wire_bits(self, segments: Sequence[Segment], size: int) -> float:
        kept = -(-total(segments) // self.ratio)
        places = 32 * K.layout.words(kept, place_bits(self.ratio))
        return (size - 1) * (places + self._format().payload_bits(kept))

    def _format(self) -> Codec:
        """How the kept values become bits."""
        if self.values == "bf16":
            return Cast("bf16")
        if self.values == "2bit":
            return TwoMagnitudes(self.block)
        return Uniform(4 if self.values == "4bit" else 8, self.block, rounding="nearest")
