"""Tensor <-> payload. Each codec is one frozen dataclass over the shared kernels."""

from .base import Codec
from .cast import Cast
from .sign import Sign
from .two_magnitudes import TwoMagnitudes
from .uniform import Uniform

__all__ = ["Cast", "Codec", "Sign", "TwoMagnitudes", "Uniform"]
