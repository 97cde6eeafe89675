"""Many checks in one job: `@check` runs a function on all ranks and keeps what it returns, or the error it raises."""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Callable
from typing import Any

import horovod.torch as hvd
import torch
from torch import Tensor, nn

results: dict[str, Any] = {}


def check(function: Callable[[], Any]) -> Callable[[], Any]:
    print(f"check {function.__name__}", file=sys.stderr, flush=True)
    try:
        results[function.__name__] = function()
    except Exception as error:
        results[function.__name__] = f"{type(error).__name__}: {error}"
        traceback.print_exc()  # for whoever reads the output of a job that failed
    return function


def report() -> None:
    print("RESULT " + json.dumps({"rank": hvd.rank(), "size": hvd.size(), **results}), flush=True)


def net(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 40), nn.Tanh(), nn.Linear(40, 40), nn.Tanh(), nn.Linear(40, 4)).to(dtype)


def optimizer(model: nn.Module, compression: Any, lr: float = 0.1, **options: Any) -> Any:
    base = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.5)
    opt = hvd.DistributedOptimizer(base, named_parameters=model.named_parameters(), compression=compression, **options)
    assert (opt._compression_session is None) == (compression is hvd.Compression.none)
    return opt


def backward(model: nn.Module, step: int, micro: int = 0, factor: float = 1.0) -> None:
    """A loss on data that differ by rank, step and micro-batch."""
    generator = torch.Generator().manual_seed(1000 * hvd.rank() + 10 * step + micro)
    x = torch.randn(8, 16, generator=generator).to(next(model.parameters()).dtype)
    (model(x).float().square().mean() * factor).backward()


def weights(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().reshape(-1).float() for p in model.parameters()])


def train(compression: Any, steps: int = 3, dtype: torch.dtype = torch.float32, **options: Any) -> nn.Module:
    model = net(dtype)
    opt = optimizer(model, compression, **options)
    for step in range(steps):
        opt.zero_grad()
        backward(model, step)
        opt.step()
    return model


def identical(model: nn.Module, process_set: Any = hvd.global_process_set) -> bool:
    """Do all ranks hold the same bits?"""
    bits = weights(model).view(torch.int32).view(1, -1)
    everyone = hvd.allgather(bits, name="identical", process_set=process_set)
    return bool((everyone == everyone[0]).all())


def distance(a: nn.Module, b: nn.Module) -> float:
    return float((weights(a) - weights(b)).abs().max())
