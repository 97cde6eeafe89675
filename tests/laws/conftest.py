"""The laws' vectors are short, but their payloads meet as long ones do; tests/laws/test_rounds.py has both."""

from __future__ import annotations

import pytest

from compression_plugins.collectives import payloads


@pytest.fixture(autouse=True)
def long_payloads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(payloads, "_WORTH_A_ROUND", 0)
