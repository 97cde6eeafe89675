"""Two ranks of torch DDP, of which rank 1 does something at a phase of a reduction: `dying.py WHAT PHASE SCHEME`.

WHAT: `die` (SIGKILL), `term` (SIGTERM), `stall` (sleeps for some seconds), `damage` (one flipped bit, under verify).
"""

import os
import signal
import sys
import time

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import compression_plugins.ddp as compression
from compression_plugins.engine.driver import Work
from compression_plugins.transports.verified import SEAL, Verified

WHAT, PHASE, SCHEME = sys.argv[1], int(sys.argv[2]), sys.argv[3]
STEP = 3
dist.init_process_group("gloo")
torch.set_num_threads(1)
RANK = dist.get_rank()
here = {"step": -1, "done": False}


def act(work, value, original=Work._send):
    if here["step"] == STEP and RANK == 1 and work.phase == PHASE and not here["done"]:
        here["done"] = True
        if WHAT in ("die", "term"):
            os.kill(os.getpid(), signal.SIGKILL if WHAT == "die" else signal.SIGTERM)
            time.sleep(60)  # SIGTERM ends it here
        if WHAT == "stall":
            time.sleep(3)
    return original(work, value)


def damage(self, data, like, rank, original=Verified._opened):
    if here["step"] == STEP and RANK == 1 and rank == 0 and WHAT == "damage":
        data = data.clone()
        data[len(data) // 3] ^= 1
        assert len(data) > SEAL
    return original(self, data, like, rank)


Work._send = act
Verified._opened = damage
torch.manual_seed(0)
ddp = DistributedDataParallel(nn.Sequential(nn.Linear(16, 64), nn.Tanh(), nn.Linear(64, 4)))
compression.compress(ddp, SCHEME, min_numel=0, verify=WHAT == "damage", bucket_mb=0.002)
optimizer = torch.optim.SGD(ddp.parameters(), lr=0.1)
print(f"rank {RANK} begins", flush=True)
for step in range(6):
    here["step"] = step
    optimizer.zero_grad()
    x = torch.randn(8, 16, generator=torch.Generator().manual_seed(10 * step + RANK))
    ddp(x).square().mean().backward()
    optimizer.step()
print(f"RESULT {sum(float(p.detach().double().sum()) for p in ddp.parameters())!r}", flush=True)
dist.destroy_process_group()
