"""Ranks that do not come, and ranks that die. Run last: what it leaves behind keeps Horovod from ending in peace."""

from __future__ import annotations

import os
import sys

import horovod.torch as hvd
import torch
from checks import backward, check, net, optimizer, report
from horovod.common.exceptions import HorovodInternalError

from compression_plugins import Compression

hvd.init()
torch.set_num_threads(1)
R = hvd.rank()


@check
def a_rank_that_never_comes_is_reported() -> None:
    os.environ["COMPRESSION_PLUGINS_HANDSHAKE_TIMEOUT"] = "2"
    model = net()
    opt = optimizer(model, Compression.topk())
    if R == 0:
        backward(model, 0)
        opt.step()
    else:
        assert opt._compression_session.name  # its place in the order of first uses


os.environ["COMPRESSION_PLUGINS_HANDSHAKE_TIMEOUT"] = "60"
report()
model = net()
opt = optimizer(model, Compression.scalecom(min_numel=1))
for step in range(1000):
    opt.zero_grad()
    backward(model, step)
    if (step, R) == (3, 1):
        os._exit(7)
    try:
        opt.step()
    except HorovodInternalError as error:
        print(f"rank {R} survived step {step}: {type(error).__name__}", flush=True)
        sys.exit(3)
