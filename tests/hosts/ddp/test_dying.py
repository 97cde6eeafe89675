"""A rank that dies, stalls, is told to end, or gets damaged bytes in the middle of a reduction: nobody hangs.

Two processes without a launcher, which would end the survivor before it can say what it has seen.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys

import pytest

from .job import SCRIPTS

LIMIT_S = 280

pytestmark = pytest.mark.nightly


def pair(what: str, phase: int, scheme: str) -> list[tuple[int, str]]:
    """(status, output) of both ranks."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(SCRIPTS / "dying.py"), what, str(phase), scheme]
    ranks = [
        subprocess.Popen(
            command, env={**os.environ, **common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in (0, 1)
    ]  # fmt: skip
    try:
        outputs = [rank.communicate(timeout=LIMIT_S)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    for output in outputs:
        assert " begins" in output, output[-4000:]
    return [(rank.returncode, output) for rank, output in zip(ranks, outputs)]


#: ScaleCom on two ranks: indices from the leader, then a sum. Phase 0 is before anything is sent.
@pytest.mark.parametrize(("what", "phase"), [("term", 0), ("die", 1), ("die", 2)])
def test_the_survivor_of_a_rank_that_dies_in_a_phase_says_whom_it_lost(what: str, phase: int) -> None:
    (status, output), (dead, _) = pair(what, phase, "scalecom")
    assert dead == -(signal.SIGKILL if what == "die" else signal.SIGTERM)
    assert status > 0 and "RESULT" not in output, "no signal, no hang, no end as if nothing had been"
    assert "rank 0 lost rank 1 in an exchange of compressed data" in output, output[-4000:]


def test_a_rank_that_stalls_is_waited_for() -> None:
    ranks = pair("stall", 1, "scalecom")
    assert [status for status, _ in ranks] == [0, 0], ranks[0][1][-4000:]
    results = [line for _, output in ranks for line in output.splitlines() if line.startswith("RESULT")]
    assert len(results) == 2 and len(set(results)) == 1, "both end with the same weights"


def test_damage_on_the_way_ends_the_job_and_names_its_sender() -> None:
    (survivor, told), (status, output) = pair("damage", 9, "topk")
    assert status > 0 and survivor > 0
    assert "what rank 0 has sent to rank 1 for the bucket of '" in output and "arrived damaged" in output
    assert "rank 0 lost rank 1" in told
