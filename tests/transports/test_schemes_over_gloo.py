"""Schemes that go hop by hop: over a torch.distributed process group every bit is the one of the local transport."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from compression_plugins.engine.reducer import Reducer
from compression_plugins.engine.saved import STATE_VERSION
from compression_plugins.transports.torch_distributed import TorchDistributed

from ..world import World, config

SIZE, STEPS = 4, 3
# Without a flush: its sum is an all-reduce of fp32, whose order is the backend's own.
VOTES: dict[str, Any] = {"flush_steps": 10**6, "eta_s": 0.5}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "ring": ("marsit", {"form": "ring", **VOTES}),
    "torus": ("marsit", {"form": "torus", **VOTES}),
    "torus of one column": ("marsit", {"form": "torus", "rows": 4, **VOTES}),
    "ssdm": ("ssdm", {}),
    "cascading_ssdm": ("cascading_ssdm", {}),
}
FRESH = {"version": STATE_VERSION, "step": 1, "size": SIZE, "vectors": {}, "tensors": {}}


def _rank(rank: int, rendezvous: str, out: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=SIZE)
    found: dict[str, list[Tensor]] = {}
    for case, (scheme, keys) in CASES.items():
        world = World(config(scheme, **keys), SIZE)  # for its plan and its gradients
        reducer = Reducer(config(scheme, **keys), TorchDistributed())
        reducer.load_state_dict(FRESH)
        found[case] = []
        for step in range(STEPS):
            found[case].append(reducer.reduce(world.bucket, world.gradients(step)[rank]).clone())
            reducer.end_step()
        found[case].append(torch.tensor(reducer.transport.sent, dtype=torch.float64))
    torch.save(found, f"{out}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def test_hop_by_hop_schemes_give_the_bits_of_the_local_transport(tmp_path: Path) -> None:
    mp.spawn(_rank, (str(tmp_path / "rendezvous"), str(tmp_path)), nprocs=SIZE)
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(SIZE)]
    for case, (scheme, keys) in CASES.items():
        world = World(config(scheme, **keys), SIZE)
        for reducer in world.reducers:
            reducer.load_state_dict(FRESH)
        for step in range(STEPS):
            expected = world.step(world.gradients(step))[0]
            assert all(torch.equal(found[case][step], expected) for found in ranks), f"{case}, step {step}"
        assert all(found[case][STEPS] == world.local.transports[0].sent for found in ranks), case
