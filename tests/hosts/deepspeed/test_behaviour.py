"""What travels when, which weights a script sees, and what is forgotten. Real jobs of two and of three ranks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from .job import deepspeed

CASES = ("bytes_of_the_table", "order_of_events", "overlap_changes_nothing", "two_engines", "exact_weights", "dropped")
Ranks = list[dict[str, Any]]


def run(folder: Path, *cases: str, ranks: int) -> tuple[Ranks, str]:
    job = deepspeed("behaviour.py", folder, *cases, ranks=ranks, launcher=False)
    assert job.returncode == 0, job.stdout[-20000:]
    found = [json.loads((folder / f"found{rank}.json").read_text()) for rank in range(ranks)]
    for rank in found:
        for name, value in rank.items():
            assert not isinstance(value, str), f"{name}: {value}\n{job.stdout[-20000:]}"
    return found, job.stdout


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> tuple[Ranks, str]:
    return run(tmp_path_factory.mktemp("two"), *CASES, ranks=2)


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> tuple[Ranks, str]:
    return run(tmp_path_factory.mktemp("three"), "overlap_changes_nothing", "two_engines", ranks=3)


def test_the_table_at_start_up_says_what_travels(two: tuple[Ranks, str]) -> None:
    for case, (sent, planned) in two[0][0]["bytes_of_the_table"].items():
        assert sent == pytest.approx(planned, rel=0.02), case


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_with_overlap_comm_messages_leave_during_backward_and_are_waited_for_after(
    two: tuple[Ranks, str], stage: int
) -> None:
    for rank in two[0]:
        events = rank["order_of_events"][str(stage)]
        assert events[0] == "message"
        assert events.index("message") < events.index("last gradient") < events.index("wait"), events


def test_overlap_changes_no_weight(two: tuple[Ranks, str], three: tuple[Ranks, str]) -> None:
    for found, _ in (two, three):
        assert all(difference <= 1e-6 for difference in found[0]["overlap_changes_nothing"].values()), found[0]


def test_two_engines_that_share_a_block_train_side_by_side(two: tuple[Ranks, str], three: tuple[Ranks, str]) -> None:
    for found, _ in (two, three):
        for rank in found:
            assert rank["two_engines"] == {"equal": [True, True], "sent": [True, True]}


@pytest.mark.parametrize("stage", [0, 1])
def test_weights_are_quantized_in_training_only(two: tuple[Ranks, str], stage: int) -> None:
    for rank in two[0]:
        found = rank["exact_weights"][str(stage)]
        assert found["training"] <= 255, found
        for reader in ("state_dict", "no_grad", "eval", "save_16bit_model"):
            assert found[reader] > 255, found
        assert found["equal"]


def test_a_rank_that_reads_exact_weights_alone_is_told_instead_of_waiting(two: tuple[Ranks, str]) -> None:
    message = two[0][0]["exact_weights"]["alone"]
    assert message.startswith("MismatchError") and "rank 1 did not come within 2 s" in message
    assert "save on every rank" in message


def test_gradients_that_no_step_took_move_nothing_later(two: tuple[Ranks, str]) -> None:
    assert all(moved == 0.0 for moved in two[0][0]["dropped"].values()), two[0][0]["dropped"]


def test_a_script_that_calls_basic_config_sees_the_table(two: tuple[Ranks, str]) -> None:
    assert "DeepSpeed: ef_signsgd on 2 ranks, ZeRO stage 2, beside backward" in two[1]
