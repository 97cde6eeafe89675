"""`local` keeps the contract of all transports."""

from __future__ import annotations

import weakref
from collections.abc import Sequence

import pytest
import torch

from compression_plugins.transports.base import Transport
from compression_plugins.transports.local import LocalWorld

from .contract import check


def keep(transports: Sequence[Transport]) -> None:
    """Run the contract on all ranks of a group."""
    size = len(transports)
    runs = [check(transport) for transport in transports]
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


@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_local_keeps_the_contract(size: int) -> None:
    keep(LocalWorld(size).transports)


@pytest.mark.parametrize("groups", [[[0, 1], [2, 3]], [[0, 3], [1, 2]], [[3, 1, 0], [2]]], ids=str)
def test_groups_of_ranks_keep_the_contract_by_themselves(groups: list[list[int]]) -> None:
    """Ranks count in ascending order, whatever order they are named in; bytes are the group's and the whole's."""
    world, sent = LocalWorld(4), {}
    for group in groups:
        members = [world.transports[rank].subgroup(group) for rank in sorted(group)]
        assert [(t.rank, t.size) for t in members] == [(i, len(group)) for i in range(len(group))]
        keep(members)
        sent |= {rank: member.sent for rank, member in zip(sorted(group), members)}
        halves = [transport.subgroup([transport.rank]) for transport in members]
        assert [(t.rank, t.size) for t in halves] == [(0, 1)] * len(group)
    assert [transport.sent for transport in world.transports] == [sent[rank] for rank in range(4)]
    assert any(sent.values())


def test_nothing_is_kept_of_an_operation_that_every_rank_has_finished() -> None:
    world = LocalWorld(3)
    handles = [transport.all_reduce(torch.ones(1000)) for transport in world.transports]
    results = [weakref.ref(handle.wait()) for handle in handles]
    assert [result() for result in results] == [None] * 3 and handles[0].poll() is False
