"""Ranks that train by themselves under Horovod; prints a report of each rank."""

import copy
import json
import sys
from pathlib import Path

import horovod.torch as hvd
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[2]))
import local_steps as laws

from compression_plugins.adapters.horovod.optimizer import load_state_dict, state_dict
from compression_plugins.horovod import Compression, finish

hvd.init()
torch.set_num_threads(1)


class Host:
    def __init__(self, config, accumulate=1):
        self.rank, self.size, self.model = hvd.rank(), hvd.size(), laws.network()
        self.accumulate = accumulate
        self.optimizer = hvd.DistributedOptimizer(
            torch.optim.Adam(self.model.parameters(), lr=laws.LR),
            named_parameters=self.model.named_parameters(),
            compression=Compression.load(config),
            backward_passes_per_step=accumulate,
        )

    def mean(self, x):
        return hvd.allreduce(x.detach().clone(), op=hvd.Average)

    def train(self, loss, accumulate=1, clip=0.0):
        self.optimizer.zero_grad()
        for micro in range(accumulate):
            (loss(micro) / accumulate).backward()
        if clip:
            self.optimizer.synchronize()
            nn.utils.clip_grad_norm_(self.model.parameters(), clip)
            with self.optimizer.skip_synchronize():
                self.optimizer.step()
        else:
            self.optimizer.step()

    def norm(self, own):
        return own

    def optimizer_state(self):
        return self.optimizer.state

    def sent(self):
        return self.optimizer._compression_session.reducer.transport.sent

    def finish(self):
        finish(self.optimizer)

    def save(self):
        return copy.deepcopy((self.model.state_dict(), self.optimizer.state_dict(), state_dict(self.optimizer)))

    def restore(self, saved):
        model, optimizer, memory = saved
        self.model.load_state_dict(model)
        self.optimizer.load_state_dict(optimizer)
        load_state_dict(self.optimizer, memory)


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
        host.optimizer.synchronize()
        scaler.unscale_(host.optimizer)
        with host.optimizer.skip_synchronize():
            scaler.step(host.optimizer)
        scaler.update()
        scales.append(scaler.get_scale())
    finite = bool(torch.isfinite(laws.own(host.model)).all())
    host.finish()
    return {
        "scales": scales,
        "steps": host.optimizer._compression_session.reducer.step,
        "finite": finite,
        "equal": not laws.spread(host, laws.own(host.model)),
    }


report = {
    "exact": laws.exact(Host),
    "accumulated": laws.exact(Host, accumulate=3),
    "clipped": laws.exact(Host, clip=0.05),
    "compressed": laws.compressed(Host),
    "moments": laws.moments(Host),
    "partly": laws.partly(Host),
    "resumed": laws.resumed(Host),
    "scaler": scaler(),
}
print("RESULT " + json.dumps({"rank": hvd.rank(), **report}), flush=True)
