"""When a reduction happens, as every rank counts it."""

from __future__ import annotations

from typing import NamedTuple


class Clock(NamedTuple):
    """The time of one reduction: the same on every rank, and after a resume.

    Attributes:
        step: optimizer steps done before this one.
        micro_batch: reductions of the same bucket done before this one within the step.
        round: exchanges done before this one; those of the dense warm-up do not count. There is one in each step, or in
            every so many (`every`). What happens now and then, such as a flush, or in turns is counted in rounds.
    """

    step: int = 0
    micro_batch: int = 0
    round: int = 0
