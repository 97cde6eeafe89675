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


def test_elastic_training_keeps_memory_when_communication_fails_and_when_a_rank_dies(
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
    assert last["alone"] == 9, "8 steps were committed"
    assert last["steps"] == 16


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("where", "settings"),
    [("outside", ()), ("inside", ("every=2",))],
    ids=["outside", "inside"],
)
def test_a_killed_rank_and_a_new_one_take_nothing_that_is_owed(
    horovodrun: Callable[..., Any], tmp_path: Path, where: str, settings: tuple[str, ...]
) -> None:
    (tmp_path / "hosts").write_text("localhost:2\n127.0.0.1:1\n")
    discover = tmp_path / "discover.sh"
    discover.write_text(f"#!/bin/sh\ncat {tmp_path}/hosts\n")
    discover.chmod(0o755)
    flags = [f for text in ("ratio=10", "min_numel=1", *settings) for f in ("--compression-set", text)]
    flags += ["--min-np", "1", "--max-np", "3", "--host-discovery-script", str(discover), "--network-interfaces", "lo"]
    arguments = [str(tmp_path), where]
    job = horovodrun("--compression", "topk", *flags, script="elastic_ranks.py", arguments=arguments, np=3, timeout=280)
    assert job.output.count("the ranks have changed; each of") == 2
    assert "is lost" not in job.output
    first, *others = job.results
    assert len(others) == 2 and {result["size"] for result in job.results} == {3}
    assert [3, 2, 3] in [result["sizes"] for result in job.results], "two ranks have lived through it"
    assert [3] in [result["sizes"] for result in job.results], "one has joined"
    assert all(result["equal"] and result["step"] == result["batch"] for result in job.results)
    assert first["owed"] > 0 and first["scale"] > 0
    assert first["missing"] < 1e-4 * first["scale"]
