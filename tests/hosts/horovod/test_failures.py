"""Ranks that do not come, ranks that die, and elastic training that goes on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.alone


def test_a_rank_that_never_comes_is_reported_and_one_that_dies_ends_the_job(horovodrun: Callable[..., Any]) -> None:
    job = horovodrun(script="failures.py", status=None, timeout=90)
    assert "did not begin its first compressed step within 2 s" in job.results[0]["a_rank_that_never_comes_is_reported"]
    assert job.status != 0 and "Exit code: 7" in job.output


def test_elastic_training_keeps_memory_and_resets_it_when_ranks_change(
    horovodrun: Callable[..., Any], tmp_path: Path
) -> None:
    hosts = ("--min-np", "1", "-H", "localhost:1,127.0.0.1:1", "--network-interfaces", "lo")
    settings = ("--compression-set", "ratio=10", "--compression-set", "min_numel=1")
    job = horovodrun(
        "--compression", "topk", *settings, *hosts, script="elastic.py", arguments=[str(tmp_path)], timeout=200
    )
    (last,) = job.results
    assert last["restored"] == last["committed"] != last["before"], "a failure brings the last commit's memory back"
    assert last["batch"] == 4, "and the script goes on from that commit"
    assert "the ranks have changed" in job.output and last["size"] == 1
    assert last["alone"] == 9, "memory is gone with rank 1, the step is not: 8 were committed"
    assert last["steps"] == 16
