"""Ranks that train by themselves and meet every so many steps: real jobs of each host, against plain local training."""

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


def _saved(folder: Path) -> Reports:
    return [torch.load(folder / f"report{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.fixture(params=["horovod", "ddp", "deepspeed"])
def reports(request: pytest.FixtureRequest, horovodrun: Callable[..., Any], tmp_path: Path) -> Reports:  # noqa: F811
    """What each rank reports; a host's job is started once."""
    host = request.param
    if host not in _done:
        if host == "horovod":
            job = horovodrun(script="local_steps.py")
            _done[host] = job.results
        elif host == "ddp":
            torchrun("local_steps.py", tmp_path, launcher=STOCK)
            _done[host] = _saved(tmp_path)
        else:
            run = deepspeed("local_steps.py", tmp_path, launcher=False)
            assert run.returncode == 0, run.stdout[-20000:]
            _done[host] = _saved(tmp_path)
    return _done[host]


@pytest.mark.parametrize("way", ["exact", "accumulated", "clipped", "bucket view"])
def test_without_compression_it_is_plain_local_training(reports: Reports, way: str) -> None:
    if way not in reports[0]:
        pytest.skip("this host has no such option")
    for report in reports:
        for step, found in enumerate(report[way]["steps"]):
            assert found["off"] < 2e-5, f"step {step}"
            local = step - 1  # two dense steps, then rounds of three
            assert found["equal"] == (local <= 0 or local % 3 == 0), f"step {step}"


@pytest.mark.parametrize("way", ["exact", "accumulated"])
def test_evaluations_and_checkpoints_see_what_all_ranks_agreed_on_last(reports: Reports, way: str) -> None:
    for report in reports:
        for found in report[way]["steps"]:
            assert found["read off"] < 1e-4 and found["saved off"] < 2e-5
            assert found["read equal"]


def test_so_does_an_evaluation_of_the_module_that_ddp_wraps(reports: Reports) -> None:
    assert all(report["module inside"]["equal"] for report in reports if "module inside" in report)


def test_replicas_are_equal_after_each_exchange_and_after_the_last_partial_round(reports: Reports) -> None:
    for report in reports:
        found = report["compressed"]
        assert found["equal"] == [step % 4 == 3 for step in range(30)]
        assert found["finished"]
        assert sum(found["losses"][-5:]) < 0.7 * sum(found["losses"][:5])
        parameters, exchanges = 32 * 24 + 24 * 40 + 40 * 32 + 72, 8
        assert found["sent"] < exchanges * (4 * parameters / 8)


def test_moments_are_averaged_where_the_configuration_says_so(reports: Reports) -> None:
    assert all(report["moments"] == {"local": False, "mean": True} for report in reports)


def test_a_part_of_the_model_is_read_as_the_whole_is(reports: Reports) -> None:
    assert all(report["partly"] == {"evaluated": True, "saved": True} for report in reports)


def test_saved_in_the_middle_of_a_round_training_goes_on_bit_for_bit(reports: Reports) -> None:
    assert all(report["resumed"]["same"] for report in reports)


def test_a_step_that_overflows_on_one_rank_is_skipped_by_all(reports: Reports) -> None:
    if "scaler" not in reports[0]:
        pytest.skip("DeepSpeed keeps torch's GradScaler to itself")
    for report in reports:
        found = report["scaler"]
        assert found["scales"] == [8.0, 8.0, 8.0, 4.0, 4.0, 4.0, 4.0, 4.0]
        assert found["steps"] == 7 and found["finite"] and found["equal"]


def test_what_cannot_train_by_itself_is_refused_with_the_nearest_choice(reports: Reports) -> None:
    for report in reports:
        if "stage 1" in report:
            remedy = "ZeRO stage 1 shards the optimizer; set zero_optimization.stage to 0, or every to 1"
            assert remedy in report["stage 1"]
            assert "use torch_autocast instead of the block, or set every to 1" in report["bf16"]
        if "joined" in report:
            assert "set every: 1, or give every rank the same number of batches" in report["joined"]
