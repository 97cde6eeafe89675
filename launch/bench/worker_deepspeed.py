"""An ordinary DeepSpeed script; compression, if any, is a block of its config."""

from __future__ import annotations

import argparse

import deepspeed
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from .worker import Loss, parser, train


class DeepSpeed:
    def __init__(self, options: argparse.Namespace) -> None:
        # DeepSpeed's shared-memory collective is compiled at the first start and serves only ranks of one machine.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        deepspeed.init_distributed("gloo")
        self.rank, self.ranks, self._options = dist.get_rank(), dist.get_world_size(), options

    def prepare(self, model: nn.Module, optimizer: Optimizer, schedule: LRScheduler | None, batch: int) -> None:
        self._engine, *_ = deepspeed.initialize(
            args=self._options, model=model, optimizer=optimizer, lr_scheduler=schedule
        )

    def step(self, loss_of: Loss) -> Tensor:
        loss = loss_of(self._engine)
        self._engine.backward(loss)
        self._engine.step()
        return loss

    def model(self) -> nn.Module:
        return self._engine.module

    def barrier(self) -> None:
        dist.barrier()

    def close(self) -> None:
        self._engine.destroy()
        dist.destroy_process_group()

    def about(self) -> dict[str, object]:
        return {}


if __name__ == "__main__":
    described = parser(__doc__)
    described.add_argument("--local_rank", type=int, default=-1, help="given by the launcher")
    options = deepspeed.add_config_arguments(described).parse_args()
    train(options, DeepSpeed(options))
