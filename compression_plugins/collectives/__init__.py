"""How payloads meet. Each is a generator that yields handles, so that it reads like the paper and one driver runs
many.
"""

from .dense import dense_sum
from .fold import ring_fold
from .half_mean import half_mean, half_mean_bits
from .payloads import gather, in_one_round, reduce_scatter, two_stage
from .shards import even_shards
from .shared_index import shared_index
from .torus import square_rows, torus_fold

__all__ = [
    "dense_sum",
    "even_shards",
    "gather",
    "half_mean",
    "half_mean_bits",
    "in_one_round",
    "reduce_scatter",
    "ring_fold",
    "shared_index",
    "square_rows",
    "torus_fold",
    "two_stage",
]
