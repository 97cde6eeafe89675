"""Double quantization: gradients and the weights that workers compute with, both at low precision."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from ..codecs import Codec, Uniform
from ..optimizer.weight_law import WeightLaw
from .base import Block, Scheme
from .registry import register

if TYPE_CHECKING:
    from torch import Tensor

    from ..optimizer.hooks import StepHook


@register
class DoubleQuantization(Scheme):
    """The synchronous form of AsyLPG's two quantizations.

    Gradients: unbiased b-bit codes, delta = max|g| / (2^(b-1) - 1), averaged by their owners and sent back the same
    way.
    Weights: workers compute gradients at Q(x), quantized so that E||Q(x) - x||^2 <= mu ||x - x~||^2, where x~ is the
    exact snapshot taken every `snapshot_steps` steps; the optimizer keeps x itself in full precision.

    Departures from the paper: one scale for each `block` of gradient values instead of one for the whole message; bits
    of the weights rounded up to 4, 8 or 16; no variance reduction, which needs a second gradient that only the
    asynchronous parameter server computes. Where all ranks hold the weights (Horovod, DeepSpeed stage 0) the quantized
    weights save no bytes; where partitions of them travel (ZeRO 1 and 2) it is the codes that travel.
    """

    name: ClassVar[str] = "double_quantization"
    paper: ClassVar[str] = "Yu, Wu, Huang, 2019, arXiv 1805.10111"

    bits: Literal[2, 4, 8] = Field(4, description="bits of a gradient value, sign included (b)")
    block: Block = Field(512, description="gradient values that share a scale")
    weights: bool = Field(True, description="compute with quantized weights")
    mu: Annotated[float, Field(gt=0, le=1e30)] = Field(
        0.5, description="error of the weights relative to their way since x~"
    )
    snapshot_steps: Annotated[int, Field(ge=1, le=10**9)] = Field(100, description="steps between exact snapshots x~")

    @property
    def weight_law(self) -> WeightLaw | None:
        return WeightLaw(self.mu, self.snapshot_steps) if self.weights else None

    def step_hook(self, parameters: Mapping[str, Tensor], seed: int) -> StepHook | None:
        from ..optimizer.quantized_weights import QuantizedWeights  # which needs torch

        law = self.weight_law
        return QuantizedWeights(law, list(parameters.items()), seed) if law else None

    @property
    def codec(self) -> Codec:
        return Uniform(self.bits, self.block, "absmax", "stochastic")
