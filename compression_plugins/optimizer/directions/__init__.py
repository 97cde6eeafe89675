"""What travels: the gradient, or what an optimizer makes of it, before any scheme compresses it.

The training script then applies what comes back with plain SGD. A direction is a frozen description; its moments are
fp32, live in the reducer's state beside the residual, and are saved, moved and taken back like it.
"""

from __future__ import annotations

from .base import GRADIENT, Direction, Gradient, Run
from .lamb import FrozenLamb
from .local import Adam, Momentum
from .shared import FrozenAdam, ZeroOneAdam

#: Every direction by its `kind`, the word of a configuration.
KINDS: dict[str, type[Direction]] = {
    "gradient": Gradient,
    "momentum": Momentum,
    "adam": Adam,
    "frozen_adam": FrozenAdam,
    "frozen_lamb": FrozenLamb,
    "zero_one_adam": ZeroOneAdam,
}

__all__ = [
    "GRADIENT",
    "KINDS",
    "Adam",
    "Direction",
    "FrozenAdam",
    "FrozenLamb",
    "Gradient",
    "Momentum",
    "Run",
    "ZeroOneAdam",
]
