"""An ordinary Horovod script; compression, if any, is a flag of `horovodrun`."""

from __future__ import annotations

import horovod.torch as hvd
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from .worker import OrdinaryStep, parser, train


class Horovod(OrdinaryStep):
    def __init__(self, peer: str) -> None:
        hvd.init()
        self.rank, self.ranks = hvd.rank(), hvd.size()
        self._compression = {"none": hvd.Compression.none, "fp16": hvd.Compression.fp16}[peer]

    def prepare(self, model: nn.Module, optimizer: Optimizer, schedule: LRScheduler | None, batch: int) -> None:
        hvd.broadcast_parameters(model.state_dict(), root_rank=0)
        names = model.named_parameters()
        self._optimizer = hvd.DistributedOptimizer(optimizer, named_parameters=names, compression=self._compression)
        self._net, self._schedule = model, schedule

    def model(self) -> nn.Module:
        return self._net

    def barrier(self) -> None:
        hvd.barrier()

    def close(self) -> None:
        hvd.shutdown()

    def about(self) -> dict[str, object]:
        return {}


if __name__ == "__main__":
    options = parser(__doc__).parse_args()
    train(options, Horovod(options.peer))
