"""Ranks of a node that meet first: real jobs of each host, four ranks in nodes of two."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from .ddp.job import STOCK, torchrun
from .deepspeed.job import deepspeed
from .horovod.conftest import horovodrun  # noqa: F401 - a fixture

pytestmark = pytest.mark.hosts

Reports = list[dict[str, Any]]
_done: dict[str, Reports] = {}
#: Horovod makes groups in a way of its own; the others' groups are torch's.
_HOSTS = ["horovod", *(pytest.param(host, marks=pytest.mark.nightly) for host in ("ddp", "deepspeed"))]


@pytest.fixture(params=_HOSTS)
def reports(request: pytest.FixtureRequest, horovodrun: Callable[..., Any], tmp_path: Path) -> Reports:  # noqa: F811
    """What each rank reports; a host's job is started once."""
    host = request.param
    if host not in _done:
        if host == "horovod":
            _done[host] = horovodrun(script="levels.py", np=4, HOROVOD_DYNAMIC_PROCESS_SETS="1").results
        else:
            if host == "ddp":
                torchrun("levels.py", tmp_path, ranks=4, launcher=STOCK)
            else:
                run = deepspeed("levels.py", tmp_path, ranks=4, launcher=False)
                assert run.returncode == 0, run.stdout[-20000:]
            _done[host] = [torch.load(tmp_path / f"report{rank}.pt", weights_only=True) for rank in range(4)]
    assert len(_done[host]) == 4
    return _done[host]


@pytest.mark.parametrize("way", ["nodes of two", "one node", "verified"])
def test_a_scheme_that_loses_nothing_trains_as_without_compression(reports: Reports, way: str) -> None:
    assert all(report[way]["off"] < 2e-6 for report in reports)


def test_replicas_stay_equal_learn_and_send_what_the_table_promises(reports: Reports) -> None:
    for report in reports:
        found = report["compressed"]
        assert found["equal"] and not found["fault"]
        assert found["loss"][1] < 0.9 * found["loss"][0]
    assert "levels: 2 nodes of 2 ranks" in "".join(report["compressed"]["said"] for report in reports)


def test_a_resumed_job_goes_on_bit_for_bit(reports: Reports) -> None:
    assert all(report["resumed"]["same"] for report in reports)


def test_where_groups_of_ranks_cannot_be_made_the_reason_and_a_remedy_are_said(reports: Reports) -> None:
    for report in reports:
        refusals = report.get("refusals", {})
        for stage in (1, 3):
            if f"stage {stage}" in refusals:
                assert (
                    f"of which ZeRO stage {stage} leaves a shard; set zero_optimization.stage to 0"
                    in (refusals[f"stage {stage}"])
                )
        if "join" in refusals:
            assert "those of an elastic job change: remove it" in refusals["elastic"]
            assert "export HOROVOD_DYNAMIC_PROCESS_SETS=1 before the job starts" in refusals["static groups"]
            assert "give every rank the same number of steps" in refusals["join"]
            assert "4 ranks cannot be divided into nodes of 3; valid: 2, 4, or node" in refusals["three"]
