"""Starts in every way that one can start: each option is a job of its own."""

import json
import os
import sys
import types

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.nn.parallel import DistributedDataParallel

HOW = sys.argv[1]
RANK = int(os.environ["RANK"])
if HOW == "other settings" and RANK == 1:
    os.environ["COMPRESSION_PLUGINS_CONFIG"] = '{"scheme": "scalecom", "ratio": 11, "min_numel": 0}'
if HOW == "without" and RANK == 1:
    del os.environ["COMPRESSION_PLUGINS_CONFIG"]


class Wrapper(DistributedDataParallel):
    """A subclass, as some libraries have."""


def train(ddp):
    optimizer = torch.optim.SGD(ddp.parameters(), lr=0.1)
    for step in range(3):
        optimizer.zero_grad()
        torch.manual_seed(step * 10 + RANK)
        ddp(torch.randn(4, 64)).square().mean().backward()
        optimizer.step()


def stands(model):
    import compression_plugins.ddp

    try:
        return compression_plugins.ddp.state_dict(model).get("step", 0)
    except ValueError:
        return -1


dist.init_process_group("gloo")
torch.manual_seed(0)
report = {"configured": "COMPRESSION_PLUGINS_CONFIG" in os.environ}
if HOW == "ways":
    plain = Wrapper(nn.Linear(64, 64))
    train(plain)
    report["subclass"] = stands(plain)
    own = DistributedDataParallel(nn.Linear(64, 64))
    own.register_comm_hook(None, default_hooks.fp16_compress_hook)
    train(own)
    report["own hook"] = stands(own)
    compiled = DistributedDataParallel(torch.compile(nn.Linear(64, 64), backend="eager"))
    train(compiled)
    report["compiled inside"] = stands(compiled.module)
    alone = dist.new_group([RANK], use_local_synchronization=True)
    single = DistributedDataParallel(nn.Linear(64, 64), process_group=alone)
    train(single)
    report["one rank"] = stands(single)
    sys.modules["horovod.torch.optimizer"] = types.ModuleType("horovod.torch.optimizer")
    beside = DistributedDataParallel(nn.Linear(64, 64))
    train(beside)
    report["beside Horovod"] = stands(beside)
    report["arguments"] = sys.argv[2:]
else:
    model = DistributedDataParallel(nn.Linear(64, 64))
    train(model)
    report["step"] = stands(model)
if RANK == 0:
    print(json.dumps(report), flush=True)
dist.barrier()
dist.destroy_process_group()
