"""A torch.distributed process group keeps the contract of all transports; its ranks need not be the global ones."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch.distributed as dist
import torch.multiprocessing as mp

from compression_plugins.transports.torch_distributed import TorchDistributed

from .contract import check


def _keep(transport: TorchDistributed) -> None:
    run = check(transport)
    handle = run.send(None)
    while True:
        while not handle.poll():  # `poll` alone must get there
            time.sleep(1e-4)
        try:
            handle = run.send(handle.wait())
        except StopIteration:
            return


def _rank(rank: int, size: int, rendezvous: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=size)
    _keep(TorchDistributed())
    members = list(range(1, size))  # rank r of the group is rank r + 1 of the job
    group = dist.new_group(members)
    if rank in members:
        _keep(TorchDistributed(group))
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.parametrize("size", [2, 3])
def test_gloo_keeps_the_contract(size: int, tmp_path: Path) -> None:
    mp.spawn(_rank, (size, str(tmp_path / "rendezvous")), nprocs=size)
