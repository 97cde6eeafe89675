"""Several reducers in one process, reducers in threads, and a fork after kernels have run."""

from __future__ import annotations

import os
import threading

import pytest
import torch
from torch import Tensor

from compression_plugins.transports.local import drive

from ..world import World, config

SCHEMES = ("topk", "scalecom", "qsgd", "ef_signsgd", "marsit", "powersgd")


def trained(scheme: str, steps: int = 3) -> list[Tensor]:
    world = World(config(scheme), 2)
    return [world.step(world.gradients(step))[0].clone() for step in range(steps)]


def test_reducers_in_threads_do_what_they_do_alone() -> None:
    """DataLoader and checkpoint threads share the process with training; so may two trainings."""
    expected = {scheme: trained(scheme) for scheme in SCHEMES}
    found: dict[str, list[Tensor]] = {}

    def run(scheme: str) -> None:
        found[scheme] = trained(scheme)

    threads = [threading.Thread(target=run, args=(scheme,)) for scheme in SCHEMES]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for scheme in SCHEMES:
        assert all(torch.equal(a, b) for a, b in zip(found[scheme], expected[scheme], strict=True)), scheme


@pytest.mark.parametrize("scheme", SCHEMES)
def test_two_reducers_whose_steps_interleave_do_what_they_do_alone(scheme: str) -> None:
    expected = trained(scheme)
    one, two = World(config(scheme), 2), World(config(scheme), 2)
    for step in range(3):
        works = [[r.start(w.bucket, g.clone()) for r, g in zip(w.reducers, w.gradients(step))] for w in (one, two)]
        drive([work for pair in zip(*works) for work in pair])
        for world, mine in zip((one, two), works):
            assert torch.equal(mine[0].result(), expected[step])
            for reducer in world.reducers:
                reducer.end_step()


@pytest.mark.filterwarnings("ignore:This process.*multi-threaded:DeprecationWarning")
def test_a_process_that_forks_after_kernels_have_run_can_use_them_on_both_sides() -> None:
    """As the workers of a DataLoader are made."""
    expected = trained("qsgd")
    child = os.fork()
    if not child:
        torch.set_num_threads(1)
        os._exit(0 if all(torch.equal(a, b) for a, b in zip(trained("qsgd"), expected)) else 3)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert all(torch.equal(a, b) for a, b in zip(trained("qsgd"), expected))
