"""A script that sets logging up, as many do, before it trains; first at the level WARNING, then at INFO."""

from __future__ import annotations

import logging

logging.basicConfig()

import horovod.torch as hvd  # noqa: E402
import torch  # noqa: E402

from compression_plugins.adapters.horovod import Compression  # noqa: E402

hvd.init()
torch.set_num_threads(1)
for level, compression in ((logging.WARNING, Compression.topk(ratio=7)), (logging.INFO, Compression.qsgd(bits=8))):
    logging.getLogger().setLevel(level)
    model = torch.nn.Linear(64, 64)
    optimizer = hvd.DistributedOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1),
        named_parameters=model.named_parameters(),
        compression=compression,
    )
    for _ in range(2):
        optimizer.zero_grad()
        model(torch.ones(4, 64)).square().mean().backward()
        optimizer.step()
