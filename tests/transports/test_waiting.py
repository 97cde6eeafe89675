"""A wait stays awake at first and leaves a long one, or one on a shared core, to the caller; by a clock of its own."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest

from compression_plugins.transports import waiting

_LONG = 50  # waits that sleep after the core was found to be shared


@dataclass
class Core:
    """Giving it up takes 0.1 ms, of which others have `taken`."""

    taken: float = 0.0
    yields: list[float] = field(default_factory=list)

    def clock(self) -> float:
        return 1e-4 * len(self.yields)

    def used(self) -> float:
        return self.clock() * (1 - self.taken)

    def give_up(self) -> None:
        self.yields.append(self.clock())


@pytest.fixture
def core(monkeypatch: pytest.MonkeyPatch) -> Core:
    core = Core()
    monkeypatch.setattr(waiting.time, "perf_counter", core.clock)
    monkeypatch.setattr(waiting.time, "process_time", core.used)
    monkeypatch.setattr(waiting.os, "sched_yield", core.give_up)
    return core


def test_a_short_wait_gives_up_the_core_until_the_operation_is_done(core: Core) -> None:
    assert waiting.Wakefulness()(lambda: len(core.yields) == 7)
    assert len(core.yields) == 7


def test_what_is_done_already_is_not_waited_for(core: Core) -> None:
    assert waiting.Wakefulness()(lambda: True)
    assert not core.yields


def test_a_long_wait_is_left_to_the_caller_after_three_milliseconds(core: Core) -> None:
    assert not waiting.Wakefulness()(lambda: False)
    assert core.yields[-1] == pytest.approx(3e-3, abs=2e-4)


def test_a_core_that_others_have_for_half_a_millisecond_is_left_to_them(core: Core) -> None:
    core.taken = 0.5
    assert not waiting.Wakefulness()(lambda: False)
    assert core.yields[-1] == pytest.approx(1e-3, abs=2e-4)


def test_after_a_shared_core_fifty_waits_sleep_at_once_and_the_next_tries_again(core: Core) -> None:
    core.taken = 1.0
    wait = waiting.Wakefulness()
    wait(lambda: False)
    core.taken, before = 0.0, len(core.yields)
    assert [wait(lambda: False) for _ in range(_LONG)] == [False] * _LONG
    assert len(core.yields) == before
    assert wait(lambda: len(core.yields) == before + 4)
    assert len(core.yields) == before + 4


def test_a_wait_that_sleeps_still_tells_that_it_is_done(core: Core) -> None:
    core.taken = 1.0
    wait = waiting.Wakefulness()
    wait(lambda: False)
    assert wait(lambda: True)
