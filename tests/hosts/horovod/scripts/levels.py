"""Nodes of two ranks under Horovod; prints a report of each rank."""

import copy
import json
import os
import sys
from pathlib import Path

import horovod.torch as hvd
import torch

sys.path.insert(0, str(Path(__file__).parents[2]))
import levels as laws
import local_steps

from compression_plugins.adapters.horovod.optimizer import load_state_dict, state_dict
from compression_plugins.horovod import Compression

hvd.init()


class Host:
    def __init__(self, config, **options):
        self.rank, self.size, self.model = hvd.rank(), hvd.size(), local_steps.network()
        self.optimizer = hvd.DistributedOptimizer(
            torch.optim.SGD(self.model.parameters(), lr=laws.LR),
            named_parameters=self.model.named_parameters(),
            compression=Compression.load(config),
            **options,
        )

    def mean(self, x):
        return hvd.allreduce(x.detach().clone(), op=hvd.Average)

    def train(self, loss):
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()

    def reducer(self):
        return self.optimizer._compression_session.reducer

    def save(self):
        return copy.deepcopy((self.model.state_dict(), state_dict(self.optimizer)))

    def restore(self, saved):
        self.model.load_state_dict(saved[0])
        load_state_dict(self.optimizer, saved[1])


def refusals():
    """At start-up, before anything is sent."""
    found = {}
    for name, environment in {
        "elastic": {"HOROVOD_ELASTIC": "1"},
        "static groups": {"HOROVOD_DYNAMIC_PROCESS_SETS": "0"},
    }.items():
        kept = {key: os.environ.get(key) for key in environment}
        os.environ.update(environment)
        try:
            Host({"scheme": "topk", "levels": 2})
        except Exception as error:
            found[name] = str(error)
        for key, value in kept.items():
            os.environ.pop(key) if value is None else os.environ.update({key: value})
    host = Host({"scheme": "powersgd", "levels": 2})
    try:
        hvd.join()
    except Exception as error:
        found["join"] = str(error)
    del host
    return {**found, "three": laws.refused(Host, levels=3)}


report = {**laws.report(Host), "refusals": refusals()}
hvd.barrier()
print("RESULT " + json.dumps({"rank": hvd.rank(), **report}), flush=True)
