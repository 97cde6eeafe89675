"""Strictness under torch DDP; leaves a report of each rank in the folder that is given."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

sys.path.insert(0, str(Path(__file__).parents[2]))
import strict as laws

import compression_plugins.ddp as compression

FOLDER = Path(sys.argv[1])
dist.init_process_group("gloo")
torch.set_num_threads(1)


class Host:
    def __init__(self, config):
        self.rank = dist.get_rank()
        self.model = DistributedDataParallel(laws.network())
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=laws.LR)
        compression.compress(self.model, config)

    def mean(self, x):
        x = x.detach().clone()
        dist.all_reduce(x)
        return x / dist.get_world_size()

    def train(self, loss):
        self.optimizer.zero_grad()
        loss().backward()
        self.optimizer.step()


def joined():
    host = Host({**laws.TOPK, "check_every": 2})
    try:
        with host.model.join():
            laws.train(host, [0])
    except Exception as error:
        return str(error)


report = {"skipped": laws.skipped(Host), "verified": laws.verified(Host), "compared": laws.compared(Host)}
report |= {"joined": joined(), "raised": laws.raised(Host)}
torch.save(report, FOLDER / f"report{dist.get_rank()}.pt")
dist.destroy_process_group()
