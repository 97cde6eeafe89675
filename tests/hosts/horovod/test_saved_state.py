"""Saved memory: bit for bit, or none on any rank, or the same words on all."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..state_damage import TOLD


def test_ranks_go_on_bit_for_bit_or_stop_together(horovodrun: Callable[..., Any], tmp_path: Path) -> None:
    job = horovodrun(script="saved_state.py", arguments=[str(tmp_path)], timeout=250)
    one, other = job.results
    for found in (one, other):
        assert found["same after 0"] and found["same after 3"]
        assert found["nothing"] == ""
    assert "nowhere holds no compression state; residuals start at zero" in job.output
    for kind, words in {**TOLD, "later": TOLD["flipped"]}.items():
        assert one[kind] == other[kind]
        assert words in one[kind] and "rank 1" in one[kind] and "\n" not in one[kind], kind
