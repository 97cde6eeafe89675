"""Nodes of two ranks under torch DDP; leaves a report of each rank in the folder that is given."""

import copy
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

sys.path.insert(0, str(Path(__file__).parents[2]))
import levels as laws
import local_steps

import compression_plugins.ddp as compression
from compression_plugins.adapters.ddp import find

FOLDER = Path(sys.argv[1])
dist.init_process_group("gloo")


class Host:
    def __init__(self, config):
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self.model = DistributedDataParallel(local_steps.network(), bucket_cap_mb=0.005)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=laws.LR)
        compression.compress(self.model, config)

    def mean(self, x):
        x = x.detach().clone()
        dist.all_reduce(x)
        return x / self.size

    def train(self, loss):
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()

    def reducer(self):
        return find(self.model).session.reducer

    def save(self):
        return copy.deepcopy((self.model.state_dict(), compression.state_dict(self.model)))

    def restore(self, saved):
        self.model.load_state_dict(saved[0])
        compression.load_state_dict(self.model, saved[1])


torch.save(laws.report(Host), FOLDER / f"report{dist.get_rank()}.pt")
dist.barrier()
