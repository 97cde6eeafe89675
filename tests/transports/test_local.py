"""`local` keeps the contract of all transports."""

from __future__ import annotations

import weakref

import pytest
import torch

from compression_plugins.transports.local import LocalWorld

from .contract import check


@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_local_keeps_the_contract(size: int) -> None:
    world = LocalWorld(size)
    runs = [check(transport) for transport in world.transports]
    handles = [run.send(None) for run in runs]
    done = 0
    while done < size:
        for rank, run in enumerate(runs):
            if handles[rank] is not None and handles[rank].poll():
                try:
                    handles[rank] = run.send(handles[rank].wait())
                except StopIteration:
                    handles[rank] = None
                    done += 1


def test_nothing_is_kept_of_an_operation_that_every_rank_has_finished() -> None:
    world = LocalWorld(3)
    handles = [transport.all_reduce(torch.ones(1000)) for transport in world.transports]
    results = [weakref.ref(handle.wait()) for handle in handles]
    assert [result() for result in results] == [None] * 3 and handles[0].poll() is False
