"""Whatever a script does between backward and step, it gets what DeepSpeed gives. `scripts/faults.py` makes the cases.

`stock` is the same script without the block.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from .job import deepspeed

REMEMBER = ("topk", "scalecom", "powersgd", "ef_signsgd", "marsit")
Ranks = list[dict[str, Any]]


def run(folder: Path, which: str, ranks: int) -> Ranks:
    job = deepspeed("faults.py", folder, which, ranks=ranks, launcher=False)
    assert job.returncode == 0, job.stdout[-20000:]
    return [json.loads((folder / f"found{rank}.json").read_text()) for rank in range(ranks)]


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Ranks:
    return run(tmp_path_factory.mktemp("two"), "two", 2)


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Ranks:
    return run(tmp_path_factory.mktemp("one"), "one", 1)


def same(ranks: Ranks, name: str) -> Any:
    """What all ranks found alike; an error of any is one of the test."""
    for number, rank in enumerate(ranks):
        assert not isinstance(rank[name], str), f"rank {number}: {rank[name]}"
    assert all(rank[name] == ranks[0][name] for rank in ranks), [rank[name] for rank in ranks]
    return ranks[0][name]


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_a_layer_that_is_unfrozen_later_trains_as_in_stock(two: Ranks, stage: int) -> None:
    """It does at stage 0; DeepSpeed's partitions are fixed at start-up."""
    found = same(two, f"an_unfrozen_layer[{stage}]")
    for moved, replicas_are_equal in (found["stock"], found["ours"]):
        assert (moved > 0.0) == (stage == 0) and replicas_are_equal, found
    assert found["distance"] <= 1e-6


@pytest.mark.parametrize("scheme", ["stock", *REMEMBER, "signsgd", "ssdm"])
def test_a_layer_that_is_frozen_later_stays(two: Ranks, scheme: str) -> None:
    found = same(two, f"a_frozen_layer[{scheme}]")
    assert found["frozen"] == 0.0 and found["trained"] > 0.0, found


@pytest.mark.parametrize("scheme", ["stock", *REMEMBER, "signsgd", "ssdm"])
def test_a_layer_that_is_never_called_stays(two: Ranks, scheme: str) -> None:
    found = same(two, f"a_layer_without_gradients[{scheme}]")
    assert found["never called"] == 0.0 and found["trained"] > 0.0, found


@pytest.mark.parametrize("scheme", ["stock", *REMEMBER, "signsgd", "ssdm"])
def test_a_layer_that_no_rank_calls_any_more_stays(two: Ranks, scheme: str) -> None:
    found = same(two, f"a_layer_without_gradients[{scheme}]")
    assert found["called no more"] == 0.0 and found["trained"] > 0.0, found


@pytest.mark.parametrize("scheme", ["stock", *REMEMBER])
def test_gradients_that_are_dropped_never_arrive(two: Ranks, scheme: str) -> None:
    assert same(two, f"dropped_gradients[{scheme}]") == 0.0


@pytest.mark.parametrize("scheme", ["stock", *REMEMBER])
def test_a_dropped_gradient_leaves_the_trajectory(two: Ranks, scheme: str) -> None:
    assert same(two, f"a_dropped_gradient_on_the_way[{scheme}]") <= 1e-6


@pytest.mark.parametrize("scheme", ["stock", "topk", "ef_signsgd"])
def test_a_step_that_overflows_leaves_the_trajectory(two: Ranks, scheme: str) -> None:
    """So it leaves the residuals as they were: five more steps hand them out."""
    found = same(two, f"an_overflow[{scheme}]")
    assert found["skipped"] == 1 and found["distance"] <= 1e-6, found


@pytest.mark.parametrize("stage", [0, 1])
def test_exempt_tensors_of_a_bf16_job_travel_as_bf16(two: Ranks, stage: int) -> None:
    """Counted twice: what is handed to `torch.distributed.all_reduce`, by dtype, and what telemetry says was sent.

    A ring of two ranks sends a buffer's own size. The compressed matrix has 384 values, of which 48 travel, each with
    its index.
    """
    for rank in two:
        found = rank[f"exempt_bf16[{stage}]"]
        assert not isinstance(found, str), found
        exempt = 2 * (found["values"] - 384)
        assert found["stock"] == {"torch.bfloat16": 2 * found["values"]}
        assert found["ours"].pop("torch.float32", 0) <= 256, "a few scales and flags at most"
        assert found["ours"] == {"torch.bfloat16": exempt}, found
        assert found["distance"] == 0.0, "rounded as stock rounds"
        if found["sent"] is not None:
            assert exempt <= found["sent"] <= exempt + 48 * 8 + 64, found  # the matrix's owner sends none of it
    assert stage or any(rank["exempt_bf16[0]"]["sent"] > exempt for rank in two)


@pytest.mark.parametrize("stage", [0, 1])
@pytest.mark.parametrize("scheme", ["stock", "topk", "ef_signsgd", "signsgd", "marsit", "double_quantization"])
def test_one_rank_trains_bit_for_bit_as_without(one: Ranks, scheme: str, stage: int) -> None:
    assert same(one, f"one_rank[{stage}]")[scheme] == 0.0
