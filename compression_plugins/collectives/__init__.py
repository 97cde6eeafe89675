"""How payloads meet. Each is a generator that yields handles, so that it reads like the paper and one driver runs
many.
"""

from .dense import dense_mean
from .fold import ring_fold
from .half_mean import half_mean, half_mean_bits, half_scatter
from .payloads import (
    ALWAYS_TWO_STAGE,
    GATHER,
    TWO_STAGE,
    Collective,
    gather_mean,
    gather_shards,
    in_one_round,
    mix,
    scatter_mean,
    two_stage,
)
from .shards import even_shards
from .shared_index import shared_index
from .torus import square_rows, torus_fold

__all__ = [
    "ALWAYS_TWO_STAGE",
    "GATHER",
    "TWO_STAGE",
    "Collective",
    "dense_mean",
    "even_shards",
    "gather_mean",
    "gather_shards",
    "half_mean",
    "half_mean_bits",
    "half_scatter",
    "in_one_round",
    "mix",
    "ring_fold",
    "scatter_mean",
    "shared_index",
    "square_rows",
    "torus_fold",
    "two_stage",
]
