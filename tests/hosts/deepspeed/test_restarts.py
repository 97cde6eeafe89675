"""A job that was killed goes on bit for bit; ranks decide together what they load, and files belong to a step."""

from __future__ import annotations

import pytest
import torch

from ..state_damage import TOLD
from .job import deepspeed

pytestmark = pytest.mark.nightly


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("restarts")
    killed = deepspeed("restarts.py", folder, "killed")
    assert killed.returncode != 0 and "was to be killed" not in killed.stdout, killed.stdout[-8000:]
    resumed = deepspeed("restarts.py", folder, "resumed")
    assert resumed.returncode == 0, resumed.stdout[-20000:]
    return folder


@pytest.fixture(scope="module")
def reports(folder):
    return [torch.load(folder / f"report{rank}.pt", weights_only=True) for rank in range(2)]


def test_a_job_killed_at_a_random_step_goes_on_bit_for_bit(folder, reports):
    (died,) = (int(path.name.removeprefix("died")) for path in folder.glob("died*"))
    for report in reports:
        assert report["first"] == died // 2 * 2 and report["norm"] > 0
        assert report["same"]


@pytest.mark.parametrize("kind", TOLD)
def test_what_is_wrong_with_one_ranks_file_is_told_to_all_in_the_same_words(reports, kind):
    one, other = (report["told"][kind] for report in reports)
    assert one == other
    assert TOLD[kind] in one and "rank 1" in one and "\n" not in one
    assert "delete all of them: memory then starts at zero" in one


def test_files_of_another_step_than_the_checkpoints_are_ignored_aloud(reports):
    raised, said, norm = reports[0]["again"]["older"]
    assert not raised and norm == 0
    assert "holds one of global step 8, the checkpoint is of another; residuals start at zero" in said
    assert [report["again"]["own"][2] > 0 for report in reports] == [True, True]


def test_a_save_without_compression_removes_what_an_earlier_one_left_under_its_tag(reports):
    for report in reports:
        assert report["again"]["swept"] and report["again"]["without"][2] == 0
    assert "holds no compression state; residuals start at zero" in reports[0]["again"]["without"][1]


def test_a_save_removes_the_files_of_another_number_of_ranks(reports):
    assert reports[0]["again"]["files"] == [f"communication_compression_rank_0000{rank}_of_00002.pt" for rank in (0, 1)]


def test_a_universal_checkpoint_keeps_the_memory(reports):
    assert all(report["universal"] for report in reports)
