"""Ranks that train by themselves under torch DDP; leaves a report of each rank in the folder that is given."""

import contextlib
import copy
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

sys.path.insert(0, str(Path(__file__).parents[2]))
import local_steps as laws

import compression_plugins.ddp as compression
from compression_plugins.adapters.ddp import find

FOLDER = Path(sys.argv[1])
dist.init_process_group("gloo")
torch.set_num_threads(1)


class Host:
    def __init__(self, config, accumulate=1, **options):
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self.model = DistributedDataParallel(laws.network(), **options)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=laws.LR)
        compression.compress(self.model, config)

    def mean(self, x):
        x = x.detach().clone()
        dist.all_reduce(x)
        return x / self.size

    def train(self, loss, accumulate=1, clip=0.0):
        self.optimizer.zero_grad()
        for micro in range(accumulate):
            with self.model.no_sync() if micro < accumulate - 1 else contextlib.nullcontext():
                (loss(micro) / accumulate).backward()
        if clip:
            nn.utils.clip_grad_norm_(self.model.parameters(), clip)
        self.optimizer.step()

    def norm(self, own):
        return own

    def optimizer_state(self):
        return self.optimizer.state

    def sent(self):
        return find(self.model).session.reducer.transport.sent

    def finish(self):
        compression.finish(self.model, self.optimizer)

    def save(self):
        return copy.deepcopy((self.model.state_dict(), self.optimizer.state_dict(), compression.state_dict(self.model)))

    def restore(self, saved):
        model, optimizer, memory = saved
        self.model.load_state_dict(model)
        self.optimizer.load_state_dict(optimizer)
        compression.load_state_dict(self.model, memory)


def scaler():
    """A step in which one rank's gradients overflow is skipped by all, and counted by none."""
    host = Host({"scheme": "ef_signsgd", "block": 32, "min_numel": 0, "every": 2})
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=100)
    scales = []
    for step in range(8):
        host.optimizer.zero_grad()
        loss = laws.loss_of(host.model, step, host.rank)
        if step == 3 and host.rank == 1:
            loss = loss * float("inf")
        scaler.scale(loss).backward()
        scaler.step(host.optimizer)
        scaler.update()
        scales.append(scaler.get_scale())
    finite = bool(torch.isfinite(laws.own(host.model)).all())
    host.finish()
    return {
        "scales": scales,
        "steps": find(host.model).session.reducer.step,
        "finite": finite,
        "equal": not laws.spread(host, laws.own(host.model)),
    }


def joined():
    host = Host({"scheme": "ef_signsgd", "min_numel": 0, "every": 2})
    try:
        with host.model.join():
            host.train(lambda micro: laws.loss_of(host.model, 0, host.rank))
    except Exception as error:
        return str(error)
    return ""


def inside():
    """An evaluation of the module without DDP around it sees what all ranks agreed on, too."""
    host = Host({"scheme": "ef_signsgd", "block": 32, "min_numel": 0, "every": 4})
    for step in range(6):
        host.train(lambda micro, step=step: laws.loss_of(host.model, step, host.rank))
    return {"equal": not laws.spread(host, laws.shown(host.model.module))}


report = {
    "exact": laws.exact(Host),
    "accumulated": laws.exact(Host, accumulate=3),
    "clipped": laws.exact(Host, clip=0.05),
    "module inside": inside(),
    "bucket view": laws.exact(lambda *a: Host(*a, gradient_as_bucket_view=True)),
    "compressed": laws.compressed(Host),
    "moments": laws.moments(Host),
    "partly": laws.partly(Host),
    "resumed": laws.resumed(Host),
    "scaler": scaler(),
    "joined": joined(),
}
torch.save(report, FOLDER / f"report{dist.get_rank()}.pt")
dist.barrier()
