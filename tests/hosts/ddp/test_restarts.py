"""A job that is killed and started again trains as if nothing had been; ranks decide together what they load."""

from __future__ import annotations

import pytest
import torch

from ..state_damage import TOLD
from .job import STOCK, torchrun


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    folder = tmp_path_factory.mktemp("restarts")
    flags = ["--max-restarts", "1", "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
    # Otherwise the second attempt of torch 2.13 may find addresses of the first in the store, and wait for the dead.
    apart = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    torchrun("restarts.py", folder, flags=flags, launcher=STOCK, environment=apart)
    return [torch.load(folder / f"report{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.nightly
def test_a_rank_killed_in_mid_step_costs_nothing_but_time(reports):
    for report in reports:
        assert (report["attempt"], report["first"]) == (1, 6)
        assert report["resumed"] == report["straight"]


@pytest.mark.nightly
@pytest.mark.parametrize("kind", TOLD)
def test_what_is_wrong_with_one_ranks_file_is_told_to_all_in_the_same_words(reports, kind):
    one, other = (report["told"][kind] for report in reports)
    assert one == other
    for told in one:
        assert TOLD[kind] in told and "rank 1" in told and "\n" not in told


@pytest.mark.nightly
def test_where_no_rank_has_a_state_memory_begins_at_zero_and_says_so(reports):
    assert reports[0]["zero"]


@pytest.mark.nightly
def test_torch_distributed_checkpoint_keeps_every_ranks_own_memory(reports):
    assert all(report["dcp"] for report in reports)
