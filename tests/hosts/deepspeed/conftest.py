"""Real `deepspeed` jobs of two ranks. One start costs seconds, so the tests of a module share a job."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    missing = importlib.util.find_spec("deepspeed") is None
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.hosts)
            if missing:
                item.add_marker(pytest.mark.skip(reason="needs deepspeed"))
