"""One rank of `scalecom-volume`: reduces one bucket under every scheme and reads its own network interface.

python -m launch.experiments.scalecom.volume_worker RANK SIZE ADDRESS NUMEL RESULT.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from compression_plugins.config import Config
from compression_plugins.engine.plan import Bucket, TensorSpec, make_plan
from compression_plugins.engine.reducer import Reducer
from compression_plugins.transports.torch_distributed import TorchDistributed

RATIO = 100
#: What is compared. Top-k is the same sparsification, each rank choosing for itself.
SCHEMES: dict[str, dict[str, Any]] = {
    "none": {"scheme": "none"},
    "topk": {"scheme": "topk", "ratio": float(RATIO)},
    "scalecom": {"scheme": "scalecom", "ratio": RATIO},
    "scalecom, bf16 values": {"scheme": "scalecom", "ratio": RATIO, "values": "bf16"},
}
_COUNTERS = Path("/sys/class/net/eth0/statistics")
_PORT = 29500  # a namespace of one's own has every port free


def bucket(config: Config, numel: int) -> Bucket:
    """One matrix of 1024 columns, in one bucket."""
    return make_plan(config, [TensorSpec("weight", (numel // 1024, 1024), "float32")]).buckets[0]


def gradient(numel: int, rank: int) -> Tensor:
    """Gaussian: a part that all ranks share and a part of the rank's own, of equal size."""
    shared, own = (torch.randn(numel, generator=torch.Generator().manual_seed(s)) for s in (0, rank + 1))
    return shared + own


def main() -> None:
    rank, size, address, numel, result = sys.argv[1:]
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://{address}:{_PORT}", rank=int(rank), world_size=int(size))
    transport, steps = TorchDistributed(), int(size)  # each rank leads once
    found = {}
    for name, document in SCHEMES.items():
        config = Config.load({**document, "bucket_mb": 4096.0})
        reducer, mine = Reducer(config, transport), gradient(int(numel), int(rank))
        _steps(reducer, mine, 1)  # opens the connections
        payload, interface = transport.sent, _interface()
        _steps(reducer, mine, steps)
        sent, received = (after - before for after, before in zip(_interface(), interface))
        found[name] = {
            "payload": (transport.sent - payload) / steps,
            "sent": sent / steps,
            "received": received / steps,
        }
    dist.barrier()
    dist.destroy_process_group()
    Path(result).write_text(json.dumps(found), encoding="utf-8")


def _steps(reducer: Reducer, mine: Tensor, steps: int) -> None:
    whole = bucket(reducer.config, mine.numel())
    for _ in range(steps):
        reducer.reduce(whole, mine.clone())
        reducer.end_step()


def _interface() -> tuple[int, int]:
    """Bytes sent and received so far, while no rank sends anything."""
    dist.barrier()
    sent, received = (int((_COUNTERS / f"{way}_bytes").read_text()) for way in ("tx", "rx"))
    dist.barrier()
    return sent, received


if __name__ == "__main__":
    main()
