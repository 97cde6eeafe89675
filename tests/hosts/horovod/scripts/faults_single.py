"""One rank: what Horovod with compression trains is what Horovod trains, and what plain torch trains."""

from __future__ import annotations

import faults_base
import torch
from faults_base import bits, case, changed, chosen, net, train, wrap


@case("topk", "ef_signsgd", "signsgd", "marsit", "powersgd", "double_quantization", "qsgd", "exempt", "stock")
def one_rank_trains_as_without(scheme: str) -> float:
    plain = net()
    train(plain, torch.optim.SGD(plain.parameters(), lr=0.1), 5)
    model = net()
    opt = wrap(model, chosen(scheme))
    train(model, opt, 3)
    for step in (3, 4):
        opt.zero_grad()
        faults_base.loss_of(model, step).backward()
        opt.synchronize()
        with opt.skip_synchronize():
            opt.step()
    return changed(bits(plain), model)


faults_base.report()
