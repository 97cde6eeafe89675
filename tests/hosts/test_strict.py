"""`verify`, `check_every` and `on_nonfinite` in real jobs of each host."""

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
_done: dict[str, tuple[Reports, str]] = {}


def _saved(folder: Path) -> Reports:
    return [torch.load(folder / f"report{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.fixture(params=["horovod", "ddp", "deepspeed"])
def job(request: pytest.FixtureRequest, horovodrun: Callable[..., Any], tmp_path: Path) -> tuple[Reports, str]:  # noqa: F811
    """What each rank reports, and what the job printed; a host's job is started once."""
    host = request.param
    if host not in _done:
        if host == "horovod":
            run = horovodrun(script="strict.py", timeout=280)
            _done[host] = run.results, run.output
        elif host == "ddp":
            output = torchrun("strict.py", tmp_path, launcher=STOCK)
            _done[host] = _saved(tmp_path), output
        else:
            done = deepspeed("strict.py", tmp_path, launcher=False)
            assert done.returncode == 0, done.stdout[-20000:]
            _done[host] = _saved(tmp_path), done.stdout
    return _done[host]


def test_a_step_with_a_nan_on_one_rank_is_as_if_it_had_not_been(job: tuple[Reports, str]) -> None:
    reports, output = job
    assert len(reports) == 2
    for report in reports:
        for way in ("skipped", "clipped", "skipped 1", "skipped 2"):
            if way in report:
                assert report[way] == {"as without it": True, "finite": True}, way
    assert "on rank 1; the step is skipped, 1 of them so far (on_nonfinite: skip)" in output


def test_or_it_ends_the_job_on_all_ranks_with_one_message(job: tuple[Reports, str]) -> None:
    for way in ("raised", "raised 2"):
        told = {report.get(way, "") for report in job[0]}
        assert len(told) == 1
        if told != {""}:
            (text,) = told
            assert text.startswith("step 2: the gradient is not finite: ") and "on rank 1 (on_nonfinite: raise)" in text
            assert "on rank 0" not in text


def test_checksums_change_no_bit(job: tuple[Reports, str]) -> None:
    assert all(report["verified"] and report.get("verified 2", True) for report in job[0])


def test_replicas_that_differ_are_named(job: tuple[Reports, str]) -> None:
    told = {report["compared"]["told"] for report in job[0]}
    assert len(told) == 1
    (text,) = told
    assert "after step 4 parameter '" in text and "2.weight' of rank 1 differs from that of rank 0" in text


def test_what_a_host_cannot_do_is_refused_with_the_remedy(job: tuple[Reports, str]) -> None:
    for report in job[0]:
        if "refused" in report:
            assert "set zero_optimization.stage to 1 or 2, or on_nonfinite to raise" in report["refused"]
        if "joined" in report:
            assert "set check_every: 0, or give every rank the same number of batches" in report["joined"]
