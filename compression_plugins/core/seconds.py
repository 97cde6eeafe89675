"""Where time goes, as the host sees it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Spent:
    """Sums of stretches of wall clock, in seconds, each an attribute of its own."""

    @contextmanager
    def spent(self, on: str) -> Iterator[None]:
        """Inside, time counts for the attribute called `on`."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            setattr(self, on, getattr(self, on) + time.perf_counter() - begin)


class Seconds(Spent):
    """What a reducer spent, over all steps so far. On CUDA, where kernels and collectives run behind the host's back,
    it is the host's share only.

    Attributes:
        encode: in scheme code before a bucket's first operation.
        decode: in scheme code after it, which between two operations may encode again.
        wire: while at least one operation was in flight, from its launch until the host noticed its end.
        exposed: while the host did nothing but wait for an operation, which nothing hid.
        in_flight: operations at this moment.
    """

    def __init__(self) -> None:
        self.encode = self.decode = self.wire = self.exposed = 0.0
        self.in_flight = 0
        self._since = 0.0

    def launched(self) -> None:
        """An operation has left."""
        if not self.in_flight:
            self._since = time.perf_counter()
        self.in_flight += 1

    def landed(self) -> None:
        """The end of an operation was noticed."""
        self.in_flight -= 1
        if not self.in_flight:
            self.wire += time.perf_counter() - self._since
