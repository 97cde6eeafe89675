"""Nodes of two ranks under DeepSpeed, stage 0; leaves a report of each rank in the folder that is given."""

import sys
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parents[2]))
import levels as laws
import local_steps

FOLDER = Path(sys.argv[1])
deepspeed.init_distributed("gloo")


class Host:
    saves = 0

    def __init__(self, block, **options):
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        network = local_steps.network()
        self.model, *_ = deepspeed.initialize(
            model=network,
            optimizer=torch.optim.SGD(network.parameters(), lr=laws.LR),
            config={"train_micro_batch_size_per_gpu": 16, "communication_compression": block, **options},
        )

    def mean(self, x):
        x = x.detach().clone()
        dist.all_reduce(x)
        return x / self.size

    def train(self, loss):
        self.model.backward(loss)
        self.model.step()

    def reducer(self):
        return self.model.communication_compression.reducer

    def save(self):
        self.model.save_checkpoint(str(FOLDER / "checkpoints"), tag="one")

    def restore(self, saved):
        self.model.load_checkpoint(str(FOLDER / "checkpoints"), tag="one")


def refused(stage):
    try:
        zero = {"zero_optimization": {"stage": stage}, "zero_allow_untested_optimizer": True}
        Host({"scheme": "topk", "levels": 2}, **zero)
    except Exception as error:
        return str(error)
    return ""


report = {**laws.report(Host), "refusals": {f"stage {stage}": refused(stage) for stage in (1, 3)}}
torch.save(report, FOLDER / f"report{dist.get_rank()}.pt")
dist.barrier()
