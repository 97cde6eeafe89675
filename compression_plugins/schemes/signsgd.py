"""signSGD with majority vote."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar

from pydantic import Field

from .. import triton_kernels as K
from .._lazy import torch
from ..codecs import Codec
from .base import Scheme
from .registry import register

if TYPE_CHECKING:
    from torch import Tensor

    from ..core.memory import Memory, Vector
    from ..triton_kernels import Key


@dataclass(frozen=True)
class Vote(Codec):
    """One fp32 word that is `magnitude`, or NaN when the gradient is not finite, then bare sign bits. sign(0) = +1.

    The layout is the one of `Sign` with a single block, whose decoder serves here too.
    """

    magnitude: float
    block: int = 32

    def nbytes(self, numel: int) -> int:
        return 4 + 4 * -(-numel // 32) if numel else 0

    def encode(
        self,
        x: Tensor,
        key: Key,
        memory: Memory | None = None,
        residual: Vector | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        out = torch.empty(self.nbytes(x.numel()), dtype=torch.uint8, device=x.device) if out is None else out
        out[:4].view(torch.float32).copy_(K.stats(x)[0] * 0 + self.magnitude)  # NaN unless all of x is finite
        out[4:] = K.sign_bits(x)
        return out

    def decode(
        self, payload: Tensor, numel: int, out: Tensor | None = None, weight: float = 1.0, accumulate: bool = False
    ) -> Tensor:
        return K.sign_decode(
            payload, numel, max(32, -(-numel // 32) * 32), out=out, weight=weight, accumulate=accumulate
        )

    def merge(self, payloads: Tensor, numel: int, key: Key | None = None) -> Tensor:
        magnitude = payloads[:, :4].contiguous().view(torch.float32).mean(0)
        return torch.cat([magnitude.view(torch.uint8), K.sign_vote(payloads[:, 4:].contiguous(), numel)])

    def average(self, payloads: Tensor, numel: int, out: Tensor) -> Tensor:
        return self.decode(self.merge(payloads, numel), numel, out=out) if numel else out


@register
class SignSGD(Scheme):
    """One bit each way: the update is the sign that most ranks voted for; a tie is +1.

    The result is +-`magnitude` whatever the size of the gradient, so the learning rate is not that of SGD.

    Departure from the paper: rows of the gradient that are zero on every rank stay zero (`says_zero`). A vote alone
    would move an embedding's unused row by a whole `magnitude`.
    """

    name: ClassVar[str] = "signsgd"
    paper: ClassVar[str] = "Bernstein et al., 2018, arXiv 1810.05291"
    suits_adam: ClassVar[bool] = False

    magnitude: Annotated[float, Field(gt=0, le=1e30)] = Field(
        1.0, description="absolute value of every element of the update"
    )

    @property
    def says_zero(self) -> bool:
        return False

    @property
    def codec(self) -> Codec:
        return Vote(self.magnitude)
