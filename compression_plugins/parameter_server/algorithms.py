"""The six algorithms, each a choice of three parts: what goes down, what goes up, and how the server steps.

One epoch of all of them (asynchronous SVRG):

    snapshot   x~ <- x;  G = (1/n) sum_i grad f_i(x~)                                   bulk-synchronous, fp32
    worker     alpha = grad f_a(x^) - grad f_a(x~)  on one mini-batch a, x^ = down(x_D);  zeta = up(alpha)
    server     x <- prox_{eta h}(x - eta (zeta + G))                                    or the momentum form

A seventh algorithm is one more class under `@register`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from .. import triton_kernels as K
from ..errors import ConfigError, nearest
from ..optimizer.weight_law import least_bits
from . import messages, quantizer
from .messages import Kind, Message

# Random streams of one ticket, told apart by the tensor word of the key.
MODEL_STREAM, GRADIENT_STREAM = 0, 1


@dataclass(frozen=True)
class Prox:
    """Proximal operator of h(x) = l1 |x|_1 + (l2/2) |x|^2."""

    l1: float
    l2: float

    def __call__(self, x: Tensor, step: float) -> Tensor:
        """argmin_z h(z) + |z - x|^2 / (2 step), in place."""
        if self.l1:
            x.copy_(torch.nn.functional.softshrink(x, step * self.l1))
        return x.div_(1 + step * self.l2) if self.l2 else x

    def value(self, x: Tensor) -> float:
        """h(x), a number."""
        return self.l1 * float(x.abs().sum()) + self.l2 / 2 * float(x.square().sum())


@dataclass
class State:
    """What the server steps on; fp32 [numel] each; `momentum` (y) and `theta` are the momentum form's."""

    x: Tensor
    snapshot: Tensor
    gradient: Tensor
    momentum: Tensor
    theta: float

    @classmethod
    def at(cls, x: Tensor, theta: float) -> State:
        x = x.detach().to("cpu", torch.float32, copy=True)
        return cls(x, x.clone(), torch.zeros_like(x), x.clone(), theta)


# --- what goes down ---


class Down(Protocol):
    def __call__(self, state: State, mu: float, key: K.Key, ticket: int) -> Message:
        """The message that carries x to a worker.

        Args:
            mu: error allowed, relative to the distance to the snapshot.
            key: of the random draws.
            ticket: number of the update that the worker is to answer with.
        """
        ...


def full_model(state: State, mu: float, key: K.Key, ticket: int) -> Message:
    """x in fp32, 32 bits per value. Raises `CompressionError` if x is not finite."""
    quantizer.largest(state.x, "the model")
    return messages.exact(Kind.MODEL, state.x, ticket)


def mu_rule_model(state: State, mu: float, key: K.Key, ticket: int) -> Message:
    """Q(x) with the fewest bits for which E||Q(x) - x||^2 <= mu ||x - x~||^2.

    No payload where x is x~; fp32 where more than 16 bits would be needed, which happens next to the optimum.
    """
    distance = math.sqrt(float(K.stats(state.x, residual=state.snapshot, alpha=-1.0)[2]))
    if distance == 0 and torch.equal(state.x, state.snapshot):
        return messages.nothing(Kind.MODEL, ticket)
    scale = quantizer.largest(state.x, "the model")
    bits = least_bits(scale, distance, state.x.numel(), mu)
    if bits is None or scale == 0:
        return messages.exact(Kind.MODEL, state.x, ticket)
    return messages.quantized(Kind.MODEL, state.x, bits, key, scale, ticket)


# --- what goes up ---


class Up(Protocol):
    def __call__(self, alpha: Tensor, bits: int, budget: float, key: K.Key, ticket: int) -> Message:
        """The message that carries alpha, fp32 [numel], to the server.

        Args:
            bits: of a value, sign included.
            budget: share of the largest legal number of survivors (sparse gradients).
            key: of the random draws.
            ticket: as it came with the model.
        """
        ...


def full_gradient(alpha: Tensor, bits: int, budget: float, key: K.Key, ticket: int) -> Message:
    """alpha in fp32, 32 bits per value. Raises `CompressionError` if it is not finite."""
    quantizer.largest(alpha, "a gradient")
    return messages.exact(Kind.GRADIENT, alpha, ticket)


def quantized_gradient(alpha: Tensor, bits: int, budget: float, key: K.Key, ticket: int) -> Message:
    """Q(alpha) with `bits` and delta = max|alpha| / (2^(bits-1) - 1): nothing is clipped."""
    scale = quantizer.largest(alpha, "a gradient")
    if scale == 0:
        return messages.nothing(Kind.GRADIENT, ticket)
    return messages.quantized(Kind.GRADIENT, alpha, bits, key, scale, ticket)


def sparse_gradient(alpha: Tensor, bits: int, budget: float, key: K.Key, ticket: int) -> Message:
    """Survivors of an unbiased random selection; all have one magnitude, so index and sign are all that travels."""
    scale = quantizer.largest(alpha, "a gradient")
    if scale == 0:
        return messages.nothing(Kind.GRADIENT, ticket)
    signs, magnitude = quantizer.sparsify(alpha, scale, budget, key)
    return messages.sparse(signs, magnitude, ticket)


# --- how the server steps ---


class Rule(Protocol):
    def start_epoch(self, state: State) -> None:
        """After the snapshot: where the inner loop starts."""

    def update(self, state: State, zeta: Tensor, lr: float, prox: Prox) -> None:
        """One inner step; may overwrite `zeta`."""

    def end_epoch(self, state: State) -> None:
        """After the last inner step; the next snapshot is taken of `state.x`."""


class Plain:
    """x <- prox(x - eta (zeta + G))."""

    def start_epoch(self, state: State) -> None:
        pass

    def update(self, state: State, zeta: Tensor, lr: float, prox: Prox) -> None:
        prox(state.x.sub_(zeta.add_(state.gradient), alpha=lr), lr)

    def end_epoch(self, state: State) -> None:
        pass


class Momentum:
    """y <- prox(y - (eta/theta)(zeta + G));  x = theta y + (1 - theta) x~;  y is carried over epochs.

    theta of the next epoch solves (1 - theta') / theta'^2 = 1 / theta^2. What the paper does with step scaling and
    snapshots is not known to us; this is the reading that accelerated best in our tests.
    """

    def start_epoch(self, state: State) -> None:
        self._interpolate(state)

    def update(self, state: State, zeta: Tensor, lr: float, prox: Prox) -> None:
        step = lr / state.theta
        prox(state.momentum.sub_(zeta.add_(state.gradient), alpha=step), step)
        self._interpolate(state)

    def end_epoch(self, state: State) -> None:
        square = state.theta**2
        state.theta = (math.sqrt(square**2 + 4 * square) - square) / 2

    @staticmethod
    def _interpolate(state: State) -> None:
        torch.lerp(state.snapshot, state.momentum, state.theta, out=state.x)


# --- the algorithms ---


class Algorithm:
    """Stateless; all state is in `State`, all parameters come as numbers."""

    name: ClassVar[str]
    paper: ClassVar[str] = "Yu, Wu, Huang, 2019, arXiv 1805.10111"
    down: Down = staticmethod(full_model)
    up: Up = staticmethod(full_gradient)
    rule: Rule = Plain()

    def send_model(self, state: State, mu: float, seed: int, ticket: int, rank: int) -> Message:
        """x_D(t) for one worker; `seed` is the run's."""
        return self.down(state, mu, K.Key(seed, MODEL_STREAM, ticket, rank), ticket)

    def send_gradient(self, alpha: Tensor, bits: int, budget: float, seed: int, ticket: int, rank: int) -> Message:
        """zeta from alpha, fp32 [numel]; `seed` is the run's."""
        return self.up(alpha, bits, budget, K.Key(seed, GRADIENT_STREAM, ticket, rank), ticket)


_ALGORITHMS: dict[str, Algorithm] = {}


def register(cls: type[Algorithm]) -> type[Algorithm]:
    """Class decorator: make an algorithm selectable by its `name`."""
    if cls.name in _ALGORITHMS and type(_ALGORITHMS[cls.name]).__module__ != cls.__module__:
        raise ConfigError(f"algorithm {cls.name!r} is registered twice")
    _ALGORITHMS[cls.name] = cls()
    return cls


def names() -> list[str]:
    """Every registered algorithm, sorted."""
    return sorted(_ALGORITHMS)


def get(name: str) -> Algorithm:
    """The algorithm called `name`; raises `ConfigError` naming the nearest valid one."""
    if name not in _ALGORITHMS:
        raise ConfigError(f"unknown method {name!r}{nearest(name, _ALGORITHMS)}")
    return _ALGORITHMS[name]


@register
class AsyLPG(Algorithm):
    """Weights by the mu rule, gradients at `bits`."""

    name = "asylpg"
    down = staticmethod(mu_rule_model)
    up = staticmethod(quantized_gradient)


@register
class SparseAsyLPG(AsyLPG):
    """AsyLPG with gradients sparsified before quantization."""

    name = "sparse_asylpg"
    up = staticmethod(sparse_gradient)


@register
class AccAsyLPG(AsyLPG):
    """AsyLPG in the momentum form."""

    name = "acc_asylpg"
    rule = Momentum()


@register
class AsyFPG(Algorithm):
    """Full precision both ways: asynchronous proximal SVRG. A baseline."""

    name = "asyfpg"


@register
class AccAsyFPG(AsyFPG):
    """AsyFPG in the momentum form. A baseline."""

    name = "acc_asyfpg"
    rule = Momentum()


@register
class QSVRG(Algorithm):
    """Full-precision weights, quantized gradients. A baseline."""

    name = "qsvrg"
    paper = "Alistarh et al., 2017, arXiv 1610.02132"
    up = staticmethod(quantized_gradient)
