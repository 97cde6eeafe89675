"""Strictness under Horovod; prints a report of each rank."""

import json
import sys
from pathlib import Path

import horovod.torch as hvd
import torch

sys.path.insert(0, str(Path(__file__).parents[2]))
import strict as laws

from compression_plugins.horovod import Compression

hvd.init()
torch.set_num_threads(1)


class Host:
    def __init__(self, config, explicit=False):
        self.rank, self.model, self.explicit = hvd.rank(), laws.network(), explicit
        self.optimizer = hvd.DistributedOptimizer(
            torch.optim.Adam(self.model.parameters(), lr=laws.LR),
            named_parameters=self.model.named_parameters(),
            compression=Compression.load(config),
        )

    def mean(self, x):
        return hvd.allreduce(x.detach().clone(), op=hvd.Average)

    def train(self, loss):
        self.optimizer.zero_grad()
        loss().backward()
        if not self.explicit:
            self.optimizer.step()
            return
        self.optimizer.synchronize()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        with self.optimizer.skip_synchronize():
            self.optimizer.step()


report = {"skipped": laws.skipped(Host), "clipped": laws.skipped(Host, explicit=True)}
report |= {"verified": laws.verified(Host), "compared": laws.compared(Host), "raised": laws.raised(Host)}
print("RESULT " + json.dumps({"rank": hvd.rank(), **report}), flush=True)
