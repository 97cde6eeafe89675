"""Each seam of Horovod that the adapter relies on. A failure here means that Horovod changed, not that we did."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from .conftest import SCRIPTS, start

horovod = pytest.importorskip("horovod")

EXPECTED: dict[str, Any] = {
    "constructor": [
        *("self", "params", "named_parameters", "compression", "backward_passes_per_step", "op"),
        *("gradient_predivide_factor", "groups", "sparse_as_dense", "process_set"),
    ],
    "adasum_constructor": ["self", "params", "named_parameters", "compression", "backward_passes_per_step"],
    # One submission by the hook, the other by synchronize(), and only then the first result is asked for.
    "hooks_call_the_class_attribute_and_synchronize_calls_callable_handles": [
        *("submit used.weight", "submit unused.weight"),
        *("take used.weight", "decompress used.weight", "take unused.weight", "decompress unused.weight"),
    ],
    "the_result_becomes_the_gradient": [7.0, 7.0],
    "accumulation_submits_in_the_last_pass_only": [
        *("submit unused.weight", "submit used.weight"),
        *("take used.weight", "decompress used.weight", "take unused.weight", "decompress unused.weight"),
    ],
    "attributes": [],
    "step_synchronizes_unless_told_not_to": [True, False],
    "operations": {
        "allreduce_async": [
            *("tensor", "average", "name", "op", "prescale_factor", "postscale_factor", "process_set"),
        ],
        "allgather_async": ["tensor", "name", "process_set"],
        "alltoall_async": ["tensor", "splits", "name", "process_set"],
        "broadcast_async": ["tensor", "root_rank", "name", "process_set"],
    },
    "alltoall_returns_the_splits_that_came": [[0, 1, 2], [3]],
    "init_makes_a_new_handle_map": [True, True],
    "process_sets_count_their_own_ranks": [0, [0], 0, 1, True],
    "groups_of_ranks_need_dynamic_process_sets": [True],
    "join_is_looked_up_in_the_package": [True, True],
    "elastic_registry": [True] * 5,
    "launcher_builds_its_parser_from_the_modules_argparse": [[None], True, ["true"]],
    "the_environment_reaches_the_workers": True,
}


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    job = start([sys.executable, str(SCRIPTS / "contract.py")])
    assert job.results, f"horovod {horovod.__version__}: {job.output[-3000:]}"
    return job.results[0]


@pytest.mark.parametrize("seam", EXPECTED)
def test_horovod_keeps(found: dict[str, Any], seam: str) -> None:
    assert found[seam] == EXPECTED[seam], f"horovod {horovod.__version__} changed: {seam.replace('_', ' ')}"


def test_the_stock_command_is_where_the_launcher_is_hooked() -> None:
    command = Path(sys.executable).with_name("horovodrun").read_text()
    assert "from horovod.runner.launch import run_commandline" in command, f"horovod {horovod.__version__}: {command}"
