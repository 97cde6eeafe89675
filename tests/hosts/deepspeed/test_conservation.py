"""Law 2 through DeepSpeed: nothing of a gradient is lost, it is only late."""

from __future__ import annotations

import json

import pytest

from .job import deepspeed

BLOCKS = {
    "ef_signsgd": {"scheme": "ef_signsgd", "min_numel": 0},  # reduce-scatter form at stages 1 to 3
    "topk": {"scheme": "topk", "ratio": 20, "min_numel": 0},
    "powersgd": {
        "scheme": "powersgd",
        "rank": 2,
        "min_numel": 0,
    },  # memory of the aggregated update; needs whole matrices
}
CASES = {
    f"{scheme} at stage {stage}": {"stage": stage, "block": b} for scheme, b in BLOCKS.items() for stage in (0, 1, 2, 3)
}


@pytest.fixture(scope="module")
def violations(tmp_path_factory):
    folder = tmp_path_factory.mktemp("conservation")
    (folder / "cases.json").write_text(json.dumps(CASES))
    job = deepspeed("conservation.py", folder, launcher=False)
    assert job.returncode == 0, job.stdout[-20000:]
    return json.loads((folder / "violations.json").read_text())


@pytest.mark.parametrize("case", CASES)
def test_applied_plus_remembered_equals_what_came_in_although_buckets_change(violations, case):
    assert violations[case] < 2e-5
