"""Asynchronous methods over a parameter server: AsyLPG, Sparse-AsyLPG, Acc-AsyLPG and their baselines.

Yu, Wu, Huang, "Double quantization for communication-efficient distributed optimization", NeurIPS 2019,
arXiv 1805.10111.

    from compression_plugins.parameter_server import AsyncTrainer
    AsyncTrainer(model, loss_fn, loader, method="asylpg", workers=4, lr=0.1, epochs=20).fit()

`messages` is the wire format, `quantizer` the mathematics, `algorithms` the six methods; `server` and `worker` are
state machines that `service` and `client` connect over TCP and `simulate` runs in one process.
"""

from __future__ import annotations

from .options import Options
from .records import Epoch
from .trainer import AsyncTrainer

__all__ = ["AsyncTrainer", "Epoch", "Options"]
