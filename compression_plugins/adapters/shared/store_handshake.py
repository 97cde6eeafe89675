"""Ranks compare what they are about to do through the key-value store of torch.distributed, before they train.

A collective could not do this: a rank without the plugin never calls it, and the others would hang. Values are JSON
text, nothing a peer writes is executed.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from typing import Any, Protocol

from ...engine.differences import TIMEOUT_VARIABLE, differences
from ...errors import MismatchError

#: Seconds to wait for the slowest rank; the environment variable `TIMEOUT_VARIABLE` overrides it.
DEFAULT_TIMEOUT = 60.0
_POLL_S = 0.02
#: Seconds that rank 0 stays when a rank is silent, so that the others can read so before the store may go with it.
#: Where all are expected it stays as long as for the slowest.
_FAREWELL_S = 10.0


class Store(Protocol):
    """What is used of `torch.distributed.Store`."""

    def set(self, key: str, value: str) -> None: ...
    def get(self, key: str) -> bytes: ...
    def check(self, keys: list[str]) -> bool: ...


def handshake(
    store: Store,
    host: str,
    name: str,
    rank: int,
    size: int,
    facts: dict[str, Any],
    absent: str = "compression-plugins is not installed there",
    timeout: float | None = None,
    remedy: str = "Give every rank the same files",
) -> None:
    """Return on every rank when all `size` ranks state equal `facts`; raise on every rank otherwise.

    Rank 0 compares and publishes the verdict, so that the store serves O(size) requests.

    Args:
        store: shared by all ranks.
        host: as messages begin.
        name: of the session, unique in the process and the same on all ranks that do the same (`Session.name`). A rank
            that waits under another name is found out, and told.
        facts: JSON-able; a nested mapping is compared key by key.
        absent: what may be wrong on a rank that does not answer.
        timeout: seconds; default `COMPRESSION_PLUGINS_HANDSHAKE_TIMEOUT` or 60.
        remedy: what to do where ranks differ.

    Raises:
        MismatchError: names the first rank that differs and in what, or the rank that did not answer.
    """
    name = _of_attempt(name)
    meeting = _Meeting(store, host, _seconds(timeout), absent, remedy)
    store.set(f"{name}/{rank}", json.dumps(facts, sort_keys=True))
    store.set(meeting.place(rank), name)
    verdict = meeting.judge(name, size, facts) if rank == 0 else meeting.verdict(name, rank)
    if verdict:
        raise MismatchError(f"{host} compression: {verdict}")


def meet(store: Store, host: str, key: str, rank: int, size: int, why: str, timeout: float | None = None) -> None:
    """Return when all `size` ranks have called this with the same `key`, which is used once.

    Args:
        why: what they are about to do together, and what to do where one cannot.

    Raises:
        MismatchError: a rank did not come within `timeout` seconds.
    """
    key, seconds = _of_attempt(key), _seconds(timeout)
    store.set(f"{key}/{rank}", "")
    for other in range(size):
        if not _until(lambda other=other: store.check([f"{key}/{other}"]), seconds):  # type: ignore[misc]
            raise MismatchError(f"{host} compression: rank {other} did not come within {seconds:g} s. {why}")


class _Meeting:
    """One handshake as a rank sees it."""

    def __init__(self, store: Store, host: str, seconds: float, absent: str, remedy: str) -> None:
        self._store, self._host, self._seconds = store, host, seconds
        self._absent, self._remedy = absent, remedy

    def place(self, rank: int) -> str:
        """The key under which a rank says where it waits."""
        return _of_attempt(f"compression_plugins/{self._host}/place/{rank}")

    def judge(self, name: str, size: int, facts: dict[str, Any]) -> str:
        """Rank 0: compare, publish, and after a bad verdict wait until those who can read it have, however late they
        come.
        """
        verdict, silent = "", 0
        for other in range(1, size):
            if not _until(lambda other=other: self._found(other, name), self._seconds):  # type: ignore[misc]
                verdict, silent = self._silent(other), other
                break
            place = name if self._store.check([f"{name}/{other}"]) else self._where(other)
            theirs = json.loads(self._store.get(f"{place}/{other}"))
            difference = differences(facts, theirs)
            if difference or place != name:
                listed = "; ".join(difference) or "the number of equal models that it has made"
                verdict = f"rank {other} differs from rank 0 in {listed}. {self._remedy}"
                break
        if not verdict:
            self._store.set(f"{name}/verdict", "")
            return ""
        waiting, published = set(range(1, size)) - {silent}, set[str]()

        def told() -> bool:
            for other in sorted(waiting):
                place = name
                if not self._store.check([f"{name}/{other}"]) and self._store.check([self.place(other)]):
                    where = self._where(other)  # which may be a meeting that is over
                    place = where if where in published or self._found(other, name) else name
                if place not in published:
                    self._store.set(f"{place}/verdict", verdict)
                    published.add(place)
                if self._store.check([f"{place}/{other}/read"]):
                    waiting.discard(other)
            return not waiting

        _until(told, _FAREWELL_S if silent else self._seconds)
        return verdict

    def verdict(self, name: str, rank: int) -> str:
        """Another rank: what rank 0 says."""
        key = f"{name}/verdict"
        # Rank 0 itself may lack the plugin; if it does not, it waits for the others first.
        if not _until(lambda: self._store.check([key]) or self._store.check([self.place(0)]), self._seconds):
            return self._silent(0)
        if not _until(lambda: self._store.check([key]), self._seconds + _FAREWELL_S):
            return self._silent(0)
        verdict = self._store.get(key).decode()
        self._store.set(f"{name}/{rank}/read", "")
        return verdict

    def _found(self, other: int, name: str) -> bool:
        """Whether rank `other` waits, here or in a meeting that nobody has judged."""
        if self._store.check([f"{name}/{other}"]):
            return True
        if not self._store.check([self.place(other)]):
            return False
        place = self._where(other)
        return place != name and not self._store.check([f"{place}/verdict"])

    def _where(self, other: int) -> str:
        return self._store.get(self.place(other)).decode()

    def _silent(self, rank: int) -> str:
        return (
            f"rank {rank} did not answer within {self._seconds:g} s. Either {self._absent}, or it crashed: "
            f"look at its log ({TIMEOUT_VARIABLE} sets the time-out)"
        )


def _of_attempt(key: str) -> str:
    """`key` for this start of the job: after a restart by torchrun the store may still hold what the last one wrote."""
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return key if attempt == "0" else f"{key}@{attempt}"


def _seconds(timeout: float | None) -> float:
    return float(os.environ.get(TIMEOUT_VARIABLE, DEFAULT_TIMEOUT)) if timeout is None else timeout


def _until(condition: Callable[[], bool], seconds: float) -> bool:
    """Whether `condition` came true in time."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(_POLL_S)
    return True
