"""How finely weights are quantized: the mu rule of double quantization."""

from __future__ import annotations

import math
from typing import NamedTuple

from ..codecs import Uniform

#: Widths of the weights' codec, of which the largest is also the largest that the rule gives.
_WIDTHS = (4, 8, 16)


class WeightLaw(NamedTuple):
    """How finely weights are quantized.

    Attributes:
        mu: bound of E||Q(x) - x||^2 relative to ||x - x~||^2, where x~ is the last snapshot.
        snapshot_steps: steps between snapshots, at which weights are not quantized.
    """

    mu: float
    snapshot_steps: int


def least_bits(largest: float, distance: float, numel: int, mu: float) -> int | None:
    """The mu rule: fewest bits for which E||Q(x) - x||^2 <= mu ||x - x~||^2, from 2 to 16; None where 16 are too few.

    Args:
        largest: max |x|.
        distance: ||x - x~||, Euclidean, to the snapshot.
        numel: number of elements of x.

    The error of stochastic rounding is at most numel * delta^2 / 4 with delta = max|x| / (2^(b-1) - 1) (Yu, Wu, Huang,
    2019, arXiv 1805.10111).
    """
    if not (math.isfinite(largest) and math.isfinite(distance)) or distance <= 0:
        return None
    levels = largest * math.sqrt(numel / (4 * mu)) / distance
    if levels > 2 ** (_WIDTHS[-1] - 1) - 1:
        return None
    return max(2, math.ceil(math.log2(levels + 1) + 1))


def mu_rule_bits(largest: float, distance: float, numel: int, mu: float) -> int | None:
    """`least_bits` rounded up to 4, 8 or 16; None: send x as it is."""
    needed = least_bits(largest, distance, numel, mu)
    return None if needed is None else next(width for width in _WIDTHS if width >= needed)


def weight_codec(bits: int, numel: int) -> Uniform:
    """One scale for the whole tensor, as the rule assumes."""
    return Uniform(bits, 32 * max(1, -(-numel // 32)))  # type: ignore[arg-type]
