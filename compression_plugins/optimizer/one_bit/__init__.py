"""DeepSpeed's optimizers of few bits, as they were until 0.18: moments in the optimizer, and what changes them travels.

They know no host: `bind` gives them the ranks. `adapters.deepspeed.one_bit` does so for an unchanged DeepSpeed config.
"""

from __future__ import annotations

from .adam import OneBitAdam
from .base import OneBit, Ranks
from .lamb import OneBitLamb
from .zero_one import ZeroOneAdam

__all__ = ["OneBit", "OneBitAdam", "OneBitLamb", "Ranks", "ZeroOneAdam"]
