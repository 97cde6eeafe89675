"""A torch.distributed process group keeps the contract of all transports; its ranks need not be the global ones."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from compression_plugins.transports.torch_distributed import TorchDistributed, _Exchange

from .contract import check


def _keep(transport: TorchDistributed) -> None:
    run = check(transport)
    handle = run.send(None)
    while True:
        while not (isinstance(handle, _Exchange) or handle.poll()):  # `poll` alone must get there
            time.sleep(1e-4)
        try:
            handle = run.send(handle.wait())
        except StopIteration:
            return


def _rank(rank: int, size: int, rendezvous: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=size)
    _keep(TorchDistributed())
    members = list(range(1, size))  # rank r of the group is rank r + 1 of the job
    group = dist.new_group(members)
    if rank in members:
        _keep(TorchDistributed(group))
    dist.barrier()
    dist.destroy_process_group()


def _groups(rank: int, rendezvous: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=4)
    whole = TorchDistributed()
    pair = whole.subgroup([2, 0] if rank % 2 == 0 else [1, 3])
    assert (pair.rank, pair.size) == (rank // 2, 2)
    _keep(pair)
    members = [1, 2, 3]
    group = dist.new_group(members)
    if rank in members:  # a part of the job makes groups of its own; rank 0 knows nothing of it
        part = TorchDistributed(group)
        place = part.subgroup([1] if part.rank == 1 else [0, 2])
        assert (place.rank, place.size) == ((0, 1) if part.rank == 1 else (part.rank // 2, 2))
        _keep(place)
        assert part.sent == place.sent
    _keep(whole)
    dist.barrier()
    dist.destroy_process_group()


def test_groups_of_gloo_ranks_keep_the_contract_by_themselves(tmp_path: Path) -> None:
    mp.spawn(_groups, (str(tmp_path / "rendezvous"),), nprocs=4)


@pytest.mark.parametrize("size", [2, 3])
def test_gloo_keeps_the_contract(size: int, tmp_path: Path) -> None:
    mp.spawn(_rank, (size, str(tmp_path / "rendezvous")), nprocs=size)
