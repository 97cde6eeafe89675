"""The comparison of ranks through a store: every rank hears the same verdict, and soon."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch.distributed as dist

from compression_plugins.adapters.shared.store_handshake import handshake, meet
from compression_plugins.errors import MismatchError


def outcomes(store: Any, names: list[str], facts: list[dict[str, Any]], timeout: float = 5.0) -> list[str]:
    """What every rank hears; "" is agreement."""

    def rank(i: int) -> str:
        try:
            handshake(store, "Host", names[i], i, len(names), facts[i], timeout=timeout)
        except MismatchError as error:
            return str(error)
        return ""

    with ThreadPoolExecutor(len(names)) as pool:
        return list(pool.map(rank, range(len(names))))


def test_equal_ranks_agree_as_often_as_they_meet() -> None:
    store = dist.HashStore()
    for name in ("a", "b"):
        assert outcomes(store, [name] * 3, [{"config": {"ratio": 1}}] * 3) == ["", "", ""]


def test_every_rank_hears_which_rank_differs_and_in_what() -> None:
    facts = [{"config": {"ratio": ratio}} for ratio in (1, 1, 2)]
    for heard in outcomes(dist.HashStore(), ["a"] * 3, facts):
        assert "rank 2 differs from rank 0 in config.ratio (1 on rank 0, 2 there)" in heard


def test_ranks_that_wait_under_different_names_are_told_at_once() -> None:
    store = dist.HashStore()
    assert outcomes(store, ["earlier", "earlier"], [{}, {}]) == ["", ""]
    started = time.monotonic()
    for heard in outcomes(store, ["a", "b"], [{"tensors": {"w": [2]}}, {"tensors": {"w": [3]}}], timeout=30.0):
        assert "rank 1 differs from rank 0 in tensors.w ([2] on rank 0, [3] there)" in heard
    assert time.monotonic() - started < 10


def test_a_session_that_one_rank_made_more_does_not_shift_the_names_of_the_others() -> None:
    store = dist.HashStore()
    store.set("extra/1", "{}")  # made and given up
    assert outcomes(store, ["a", "a"], [{}, {}]) == ["", ""]


def test_rank_0_stays_until_the_others_have_read_a_bad_verdict() -> None:
    class Slow:
        """The store as a rank sees it that is slow to read."""

        def __init__(self, store: Any) -> None:
            self.store = store
            self.read = False

        def set(self, key: str, value: str) -> None:
            self.store.set(key, value)
            self.read |= key.endswith("/read")

        def check(self, keys: list[str]) -> bool:
            return bool(self.store.check(keys))

        def get(self, key: str) -> bytes:
            if key.endswith("/verdict"):
                time.sleep(0.5)
            return bytes(self.store.get(key))

    store = dist.HashStore()
    slow = Slow(store)
    with ThreadPoolExecutor(2) as pool:
        other = pool.submit(lambda: handshake(slow, "Host", "a", 1, 2, {"x": 2}, timeout=5.0))
        first = pool.submit(lambda: handshake(store, "Host", "a", 0, 2, {"x": 1}, timeout=5.0))
        assert isinstance(first.exception(), MismatchError)
        assert slow.read, "rank 0 raised, and would have taken the store with it, before rank 1 had read"
        assert isinstance(other.exception(), MismatchError)


def test_two_that_wait_under_another_name_are_told_at_once() -> None:
    started = time.monotonic()
    for heard in outcomes(dist.HashStore(), ["a", "b", "b"], [{"x": 1}, {"x": 2}, {"x": 1}], timeout=30.0):
        assert "rank 1 differs from rank 0 in x" in heard
    assert time.monotonic() - started < 10


def test_rank_0_stays_for_one_that_comes_after_the_verdict() -> None:
    def late() -> None:
        time.sleep(1.0)
        handshake(store, "Host", "a", 2, 3, {"x": 1}, timeout=10.0)

    def host() -> bool:
        with pytest.raises(MismatchError, match="rank 1 differs from rank 0 in x"):
            handshake(store, "Host", "a", 0, 3, {"x": 1}, timeout=10.0)
        return bool(store.check(["a/2/read"]))  # now the store may go

    store = dist.HashStore()
    with ThreadPoolExecutor(3) as pool:
        last = pool.submit(late)
        other = pool.submit(lambda: handshake(store, "Host", "a", 1, 3, {"x": 2}, timeout=10.0))
        assert pool.submit(host).result(), "rank 0 raised, and would have taken the store with it, before rank 2 came"
        assert "rank 1 differs" in str(other.exception()) and "rank 1 differs" in str(last.exception())


def test_a_silent_rank_is_named() -> None:
    def one(rank: int) -> str:
        try:
            handshake(store, "Host", "a", rank, 3, {}, absent="it is not installed there", timeout=0.3)
        except MismatchError as error:
            return str(error)
        return ""

    store = dist.HashStore()
    with ThreadPoolExecutor(2) as pool:
        for heard in pool.map(one, (0, 1)):
            assert "rank 2 did not answer within 0.3 s. Either it is not installed there" in heard


def test_whoever_comes_alone_to_a_meeting_gets_an_error() -> None:
    store = dist.HashStore()
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda rank: meet(store, "Host", "k/0", rank, 2, "why"), (0, 1)))
    try:
        meet(store, "Host", "k/1", 0, 2, "Save on every rank", timeout=0.2)
    except MismatchError as error:
        assert "rank 1 did not come within 0.2 s. Save on every rank" in str(error)
    else:
        raise AssertionError("nobody else came")


def test_a_job_that_is_started_again_does_not_read_what_its_last_attempt_wrote(monkeypatch: pytest.MonkeyPatch) -> None:
    store = dist.HashStore()
    assert outcomes(store, ["a", "a"], [{"step": 0}] * 2) == ["", ""]
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert outcomes(store, ["a", "a"], [{"step": 6}] * 2) == ["", ""]
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "2")
    heard = outcomes(store, ["a", "a"], [{"step": 6}, {"step": 8}])
    assert all("step (6 on rank 0, 8 there)" in text for text in heard)
