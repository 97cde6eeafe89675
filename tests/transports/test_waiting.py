"""The first milliseconds of a wait."""

from __future__ import annotations

import pytest

from compression_plugins.transports import base


@pytest.fixture
def yields(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock on which giving up the core takes a tenth of a millisecond; the times at which that happened."""
    times: list[float] = []
    monkeypatch.setattr(base.time, "perf_counter", lambda: 1e-4 * len(times))
    monkeypatch.setattr(base.os, "sched_yield", lambda: times.append(1e-4 * len(times)))
    return times


def test_a_short_wait_gives_up_the_core_until_the_operation_is_done(yields: list[float]) -> None:
    assert base.stay_awake(lambda: len(yields) == 7)
    assert len(yields) == 7


def test_what_is_done_already_is_not_waited_for(yields: list[float]) -> None:
    assert base.stay_awake(lambda: True)
    assert not yields


def test_a_long_wait_is_left_to_the_caller_after_three_milliseconds(yields: list[float]) -> None:
    assert not base.stay_awake(lambda: False)
    assert yields[-1] == pytest.approx(3e-3, abs=2e-4)
