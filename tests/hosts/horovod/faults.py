"""What the tests of `scripts/faults*.py` share."""

from __future__ import annotations

from typing import Any

#: Of `scripts/faults_base.py`.
REMEMBER = ("topk", "scalecom", "powersgd", "ef_signsgd", "marsit")
SIGNS = ("signsgd", "ssdm", "cascading_ssdm", "ef_signsgd", "marsit")
#: Thousands of small steps: Horovod looks for work more often than once in a millisecond, and a hang ends the job.
FAST = {
    "HOROVOD_CYCLE_TIME": "0.5",
    "HOROVOD_STALL_CHECK_TIME_SECONDS": "5",
    "HOROVOD_STALL_SHUTDOWN_TIME_SECONDS": "20",
}


def same(ranks: list[dict[str, Any]], name: str) -> Any:
    """What all ranks found alike; an error of any is one of the test."""
    assert len(ranks) > 0, "the job gave no results"
    for rank in ranks:
        assert not isinstance(rank[name], str), f"rank {rank['rank']}: {rank[name]}"
    assert all(rank[name] == ranks[0][name] for rank in ranks), [rank[name] for rank in ranks]
    return ranks[0][name]
