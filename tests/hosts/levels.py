"""What must hold on every host where nodes of two ranks meet (`levels`); imported by the scripts of the hosts.

A host is an object with `rank`, `size`, `model`, `mean(tensor)`, `train(loss)` which takes one step of SGD with rate
`LR`, `sent()` bytes, `save()` and `restore(saved)`.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable
from typing import Any

import torch
from local_steps import loss_of, network, own, spread
from torch import Tensor

LR = 1.0


def trained(host: Any, first: int, last: int) -> Tensor:
    for step in range(first, last):
        host.train(loss_of(host.model, step, host.rank))
    return own(host.model)


def plain(host: Any, steps: int) -> Tensor:
    """The same training by means of gradients."""
    model = network()
    for step in range(steps):
        loss_of(model, step, host.rank).backward()
        with torch.no_grad():
            for p in model.parameters():
                p -= LR * host.mean(p.grad)
                p.grad = None
    return own(model)


def nothing_lost(make: Callable[..., Any], **keys: Any) -> dict[str, Any]:
    """A scheme that keeps every value trains as without compression."""
    host = make({"scheme": "topk", "ratio": 1.0, "min_numel": 0, **keys})
    return {"off": float((trained(host, 0, 6) - plain(host, 6)).abs().max())}


def compressed(make: Callable[..., Any]) -> dict[str, Any]:
    """Replicas stay equal, learn, and send what the table at start-up has promised."""
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        host = make({"scheme": "ef_signsgd", "block": 32, "min_numel": 0, "levels": 2, "bucket_mb": 0.004})
        before = float(host.mean(loss_of(host.model, 0, host.rank).detach().view(1)))
        weights = trained(host, 0, 20)
    after = float(host.mean(loss_of(host.model, 20, host.rank).detach().view(1)))
    fault = host.reducer().ledger.report(1)
    return {"equal": not spread(host, weights), "loss": [before, after], "fault": fault, "said": said.getvalue()}


def resumed(make: Callable[..., Any]) -> dict[str, Any]:
    """From the weights and each rank's own memory, bit for bit."""
    config = {"scheme": "scalecom", "ratio": 10, "min_numel": 0, "levels": 2}
    host = make(config)
    trained(host, 0, 3)
    saved = host.save()
    wanted = trained(host, 3, 6)
    other = make(config)
    other.restore(saved)
    return {"same": torch.equal(trained(other, 3, 6), wanted)}


def report(make: Callable[..., Any]) -> dict[str, Any]:
    torch.set_num_threads(1)
    return {
        "nodes of two": nothing_lost(make, levels=2),
        "one node": nothing_lost(make, levels="node"),
        "verified": nothing_lost(make, levels=2, verify=True),
        "compressed": compressed(make),
        "resumed": resumed(make),
    }


def refused(make: Callable[..., Any], **keys: Any) -> str:
    try:
        trained(make({"scheme": "topk", "min_numel": 0, **keys}), 0, 1)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""
