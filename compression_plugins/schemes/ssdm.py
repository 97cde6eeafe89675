"""SSDM: signs drawn at random, so that their mean is the gradient."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from .. import triton_kernels as K
from .._lazy import torch
from ..codecs import Codec
from ..collectives import GATHER, Collective
from ..core.memory import Memory, Vector
from .base import Scheme
from .registry import register

if TYPE_CHECKING:
    from torch import Tensor

    from ..triton_kernels import Key


@dataclass(frozen=True)
class StochasticSign(Codec):
    """x -> +-||x||_2, plus with probability (1 + x_j / ||x||_2) / 2.

    Layout: one fp32 norm, then the sign bits padded to whole 4-byte words. Unbiased; the variances of `numel` elements
    add up to (numel - 1) ||x||^2, and ||decode(encode(x))||^2 = numel ||x||^2 always.
    """

    block: int = 32

    def nbytes(self, numel: int) -> int:
        return K.layout.sign_bytes(numel, K.layout.single_block(numel))

    def encode(
        self,
        x: Tensor,
        key: Key,
        memory: Memory | None = None,
        residual: Vector | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        assert memory is None, "an unbiased message needs no memory"
        return K.sign_draw(x, key, out=out)

    def decode(
        self, payload: Tensor, numel: int, out: Tensor | None = None, weight: float = 1.0, accumulate: bool = False
    ) -> Tensor:
        block = K.layout.single_block(numel)
        return K.sign_decode(payload, numel, block, out=out, weight=weight, accumulate=accumulate)

    def merge(self, payloads: Tensor, numel: int, key: Key) -> Tensor:
        return self.encode(self.average(payloads, numel, torch.empty(numel, device=payloads.device)), key)


@register
class SSDM(Scheme):
    """Each rank sends signs drawn with P(+1) = 1/2 + g_j / (2 ||g||) and the norm of its bucket; the decoded messages
    are averaged in rank order. Unbiased, without memory, and with a variance of (d - 1) ||g||^2 / n: it needs a small
    learning rate.

    Wire: an all-gather, (n - 1)(d + 32) bits from each rank, with d rounded up to a multiple of 32. Sums of bare signs,
    ceil(log2(n + 1)) bits per element in an all-reduce, are another wire, open only to ranks with one common norm.

    Departures from the paper, as we understand it: messages keep their norm (its own step is along the mean of bare
    signs), and momentum is left to the optimizer, after the average, instead of being drawn from. Rows that are zero on
    every rank stay zero (`says_zero`); their signs alone would move them by the norm of the whole bucket.
    """

    name: ClassVar[str] = "ssdm"
    paper: ClassVar[str] = "Safaryan & Richtárik, 2021, arXiv 1905.12938"
    suits_adam: ClassVar[bool] = False

    @property
    def says_zero(self) -> bool:
        return False

    @property
    def codec(self) -> Codec:
        return StochasticSign()

    @property
    def collective(self) -> Collective:
        """A second rounding would add as much variance as all the first ones together, and more."""
        return GATHER
