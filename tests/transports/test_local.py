"""`local` keeps the contract of all transports."""

from __future__ import annotations

import pytest

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
