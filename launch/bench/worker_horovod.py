"""An ordinary Horovod script; compression, if any, is a flag of `horovodrun`."""

from __future__ import annotations

import horovod.torch as hvd
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from .worker import Loss, parser, train


class Horovod:
    def __init__(self, peer: str) -> None:
        hvd.init()
        self.rank, self.ranks = hvd.rank(), hvd.size()
        self._compression = {"none": hvd.Compression.none, "fp16": hvd.Compression.fp16}[peer]

    def prepare(self, model: nn.Module, optimizer: Optimizer, schedule: LRScheduler | None, batch: int) -> None:
        hvd.broadcast_parameters(model.state_dict(), root_rank=0)
        names = model.named_parameters()
        self._optimizer = hvd.DistributedOptimizer(optimizer, named_parameters=names, compression=self._compression)
        self._model, self._schedule = model, schedule

    def step(self, loss_of: Loss) -> Tensor:
        self._optimizer.zero_grad()
        loss = loss_of(self._model)
        loss.backward()
        self._optimizer.step()
        if self._schedule:
            self._schedule.step()
        return loss

    def model(self) -> nn.Module:
        return self._model

    def barrier(self) -> None:
        hvd.barrier()

    def close(self) -> None:
        hvd.shutdown()

    def about(self) -> dict[str, object]:
        return {}


if __name__ == "__main__":
    options = parser(__doc__).parse_args()
    train(options, Horovod(options.peer))
