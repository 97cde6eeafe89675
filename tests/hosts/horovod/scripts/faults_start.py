"""A job whose ranks do not construct the same optimizers."""

from __future__ import annotations

import faults_base
from faults_base import STOCK, case, distance, everything, identical, net, train, wrap


@case()
def a_rank_may_construct_an_optimizer_more() -> list[object]:
    """Stock communicates nothing in a constructor, so it does not matter who calls it how often."""
    if faults_base.R == 1:
        wrap(net(), everything(), tag="unused.")
    models = [net(), net()]
    for model, compression in zip(models, (STOCK, everything())):
        train(model, wrap(model, compression), 3)
    return [distance(*models), identical(models[1])]


faults_base.report()
