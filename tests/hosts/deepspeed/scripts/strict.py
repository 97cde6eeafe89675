"""Strictness under DeepSpeed; leaves a report of each rank in the folder that is given."""

import sys
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parents[2]))
import strict as laws

FOLDER = Path(sys.argv[1])
deepspeed.init_distributed("gloo")
torch.set_num_threads(1)


class Host:
    def __init__(self, block, stage=0, **options):
        self.rank = dist.get_rank()
        network = laws.network()
        self.model, *_ = deepspeed.initialize(
            model=network,
            optimizer=torch.optim.Adam(network.parameters(), lr=laws.LR),
            config={
                "train_micro_batch_size_per_gpu": 16,
                "communication_compression": block,
                "zero_allow_untested_optimizer": True,
                "zero_optimization": {"stage": stage},
                **options,
            },
        )

    def mean(self, x):
        x = x.detach().clone()
        dist.all_reduce(x)
        return x / dist.get_world_size()

    def train(self, loss):
        self.model.backward(loss())
        self.model.step()


def refused():
    try:
        Host({**laws.TOPK, "on_nonfinite": "skip"}, bf16={"enabled": True})
    except Exception as error:
        return str(error)


class Sharded(Host):
    def __init__(self, block):
        super().__init__(block, stage=2)


report = {"skipped": laws.skipped(Host), "clipped": laws.skipped(Host, gradient_clipping=1.0)}
report |= {f"skipped {stage}": laws.skipped(Host, stage=stage) for stage in (1, 2)}
report |= {"verified": laws.verified(Host), "verified 2": laws.verified(Sharded), "compared": laws.compared(Host)}
report |= {"refused": refused(), "raised": laws.raised(Host), "raised 2": laws.raised(Sharded)}
torch.save(report, FOLDER / f"report{dist.get_rank()}.pt")
dist.destroy_process_group()
