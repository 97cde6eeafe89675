"""Tensor <-> payload. Each codec is one frozen dataclass over the shared kernels."""

from .base import Codec
from .cast import Cast
from .sign import Sign
from .uniform import Uniform

__all__ = ["Cast", "Codec", "Sign", "Uniform"]
