"""Ranks compare what they are about to do through the key-value store of torch.distributed, before they train.

A collective could not do this: a rank without the plugin never calls it, and the others would hang. Values are JSON
text, nothing a peer writes is executed.
"""

from __future__ import annotations

import json
import os
from datetime import timedelta
from typing import Any, Protocol

from ...errors import MismatchError
from .differences import TIMEOUT_VARIABLE, differences

#: Seconds to wait for the slowest rank; the environment variable `TIMEOUT_VARIABLE` overrides it.
DEFAULT_TIMEOUT = 60.0


class Store(Protocol):
    """What is used of `torch.distributed.Store`."""

    def set(self, key: str, value: str) -> None: ...
    def get(self, key: str) -> bytes: ...
    def wait(self, keys: list[str], timeout: timedelta) -> None: ...


def handshake(
    store: Store,
    key: str,
    rank: int,
    size: int,
    facts: dict[str, Any],
    timeout: float | None = None,
    host: str = "communication_compression",
) -> None:
    """Return on every rank when all `size` ranks state equal `facts`; raise on every rank otherwise.

    Rank 0 compares and publishes the verdict, so that the store serves O(size) requests.

    Args:
        store: shared by all ranks.
        key: unique to this handshake and equal on all ranks.
        facts: JSON-able; a nested mapping is compared key by key.
        timeout: seconds; default `COMPRESSION_PLUGINS_HANDSHAKE_TIMEOUT` or 60.
        host: how messages begin.

    Raises:
        MismatchError: names the first rank that differs and in what, or the rank that did not answer.
    """
    seconds = float(os.environ.get(TIMEOUT_VARIABLE, DEFAULT_TIMEOUT)) if timeout is None else timeout
    store.set(f"{key}/{rank}", json.dumps(facts, sort_keys=True))
    if rank == 0:
        verdict = _compare(store, key, size, facts, seconds)
        store.set(f"{key}/verdict", verdict)
    else:
        try:
            _read(store, f"{key}/0", seconds, 0)  # rank 0 itself may lack the plugin
            verdict = _read(store, f"{key}/verdict", seconds + 10.0, 0)  # it waits `seconds` for the others
        except MismatchError as error:
            raise MismatchError(f"{host}: {error}") from error
    if verdict:
        raise MismatchError(f"{host}: {verdict}")


def _compare(store: Store, key: str, size: int, facts: dict[str, Any], seconds: float) -> str:
    for other in range(1, size):
        try:
            theirs = json.loads(_read(store, f"{key}/{other}", seconds, other))
        except MismatchError as error:
            return str(error)
        difference = differences(facts, theirs)
        if difference:
            return f"rank {other} differs from rank 0 in {'; '.join(difference)}. Give every rank the same files"
    return ""


def _read(store: Store, key: str, seconds: float, rank: int) -> str:
    try:
        store.wait([key], timedelta(seconds=seconds))
    except Exception as error:  # torch raises DistStoreError, RuntimeError or a C++ time-out, depending on the store
        raise MismatchError(
            f"rank {rank} did not answer within {seconds:g} s. Either compression-plugins is not installed there, "
            "it was not given this configuration, or it crashed: look at its log "
            f"({TIMEOUT_VARIABLE} sets the time-out)"
        ) from error
    return store.get(key).decode()
