"""How the host waits for an operation: awake at first, unless others want its core."""

from __future__ import annotations

import os
import time
from collections.abc import Callable

#: A core that falls asleep takes up to 4 ms to wake for the end of an operation that itself takes half of one. One that
#: never sleeps is missed by whatever else could run there, so that long waits do sleep.
_AWAKE_S = 3e-3
#: Others had the core for so long during one wait: it is shared, and its time is better spent by them.
_TAKEN_S = 5e-4
#: Waits that sleep at once after a core was found to be shared.
_ASLEEP = 50


class Wakefulness:
    """The first milliseconds of every wait of one process.

    Where ranks share cores, a rank that polls delays the one that it waits for: four ranks on two cores exchange some
    kilobytes in 7 ms asleep and in 11 to 14 ms awake. What the clock shows beyond the process's own processor time is
    what others had of the core, for the process is always ready to run while it waits awake.
    """

    def __init__(self) -> None:
        self._asleep = 0  # waits until it is tried again

    def __call__(self, done: Callable[[], bool]) -> bool:
        """Give up the core from poll to poll, until `done()`, too long, or others want the core; is it done?"""
        if self._asleep:
            self._asleep -= 1
            return done()
        start, used = time.perf_counter(), time.process_time()
        while not (finished := done()):
            os.sched_yield()
            passed = time.perf_counter() - start
            if passed - (time.process_time() - used) > _TAKEN_S:
                self._asleep = _ASLEEP
                return done()
            if passed > _AWAKE_S:
                break
        return finished


stay_awake = Wakefulness()
