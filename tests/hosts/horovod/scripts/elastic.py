"""An ordinary elastic script, in which communication fails once and rank 1 dies later. Argument: a folder for marks."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import horovod.torch as hvd
import torch
from horovod.common.exceptions import HorovodInternalError
from torch import nn

marks = Path(sys.argv[1])
hvd.init()
torch.manual_seed(0)
torch.set_num_threads(1)
model = nn.Sequential(nn.Linear(16, 64), nn.Tanh(), nn.Linear(64, 4))
optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
optimizer = hvd.DistributedOptimizer(optimizer, named_parameters=model.named_parameters())
log: dict[str, object] = {}


def memory() -> float:
    """What this rank has not sent yet."""
    pieces = optimizer._compression_session.state_dict()["vectors"]["residual"].values()
    return sum(float(piece.abs().sum()) for parts in pieces for piece in parts.values())


@hvd.elastic.run
def train(state: hvd.elastic.TorchState) -> None:
    if state.batch and hvd.size() == 2 and "restored" not in log:
        log["restored"] = memory()
        log["batch"] = state.batch
    while state.batch < 16:
        optimizer.zero_grad()
        x = torch.randn(8, 16, generator=torch.Generator().manual_seed(100 * hvd.rank() + state.batch))
        model(x).square().mean().backward()
        mark = marks / f"failed{hvd.rank()}"
        if state.batch == 6 and not mark.exists():
            mark.touch()
            log["before"] = memory()
            raise HorovodInternalError("the network failed, says the test")
        if state.batch == 11 and hvd.rank() == 1:
            os._exit(1)
        optimizer.step()
        state.batch += 1
        if state.batch % 4 == 0:
            state.commit()
            if state.batch == 4:
                log["committed"] = memory()
        if hvd.size() == 1 and "alone" not in log:
            log["alone"] = optimizer._compression_session.reducer.step


train(hvd.elastic.TorchState(model=model, optimizer=optimizer, batch=0))
log |= {"rank": hvd.rank(), "size": hvd.size(), "steps": optimizer._compression_session.reducer.step}
print("RESULT " + json.dumps(log), flush=True)
