"""How payloads meet. Each is a generator that yields handles, so that it reads like the paper and one driver runs
many.
"""

from .dense import dense_sum
from .fold import ring_fold
from .gather import gather
from .shared_index import shared_index
from .two_stage import even_shards, reduce_scatter, two_stage

__all__ = ["dense_sum", "even_shards", "gather", "reduce_scatter", "ring_fold", "shared_index", "two_stage"]
