"""Where a reducer's time goes, as the host sees it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Seconds:
    """Sums over all steps so far. On CUDA, where kernels and collectives run behind the host's back, they are the
    host's share only.

    Attributes:
        encode: of scheme code before a bucket's first operation.
        decode: of scheme code after it, which between two operations may encode again.
        wire: while at least one operation was in flight, from its launch until the host noticed its end.
        exposed: while the host did nothing but wait for an operation, which nothing hid.
        in_flight: operations at this moment.
    """

    def __init__(self) -> None:
        self.encode = self.decode = self.wire = self.exposed = 0.0
        self.in_flight = 0
        self._since = 0.0

    @contextmanager
    def coding(self, first: bool) -> Iterator[None]:
        begin = time.perf_counter()
        try:
            yield
        finally:
            spent = time.perf_counter() - begin
            if first:
                self.encode += spent
            else:
                self.decode += spent

    @contextmanager
    def waiting(self) -> Iterator[None]:
        begin = time.perf_counter()
        try:
            yield
        finally:
            self.exposed += time.perf_counter() - begin

    def launched(self) -> None:
        if not self.in_flight:
            self._since = time.perf_counter()
        self.in_flight += 1

    def landed(self) -> None:
        self.in_flight -= 1
        if not self.in_flight:
            self.wire += time.perf_counter() - self._since
