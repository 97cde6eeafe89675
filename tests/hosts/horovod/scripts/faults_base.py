"""What the scripts of `test_faults*.py` share: cases with results of their own, and optimizers built as a user does.

Only what users have is used here, so that every case can be run with Horovod's own compressor for comparison.
"""

from __future__ import annotations

import json
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any

import horovod.torch as hvd
import torch
from torch import Tensor, nn

from compression_plugins.adapters.horovod import Compression

STOCK = hvd.Compression.none
#: Schemes that remember what they did not send.
REMEMBER = ("topk", "scalecom", "powersgd", "ef_signsgd", "marsit")
#: Schemes that send a sign for every element.
SIGNS = ("signsgd", "ssdm", "cascading_ssdm", "ef_signsgd", "marsit")

hvd.init()
torch.set_num_threads(1)
R = hvd.rank()
_results: dict[str, Any] = {}
_case = ""


def case(*schemes: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Run the function on all ranks, once for each scheme, and keep what it returns or the error it raises."""

    def run(function: Callable[..., Any]) -> Callable[..., Any]:
        for scheme in schemes or ("",):
            global _case
            _case, began = f"{function.__name__}[{scheme}]" if scheme else function.__name__, time.monotonic()
            try:
                _results[_case] = function(scheme) if scheme else function()
            except Exception as error:
                _results[_case] = f"{type(error).__name__}: {error}"
                traceback.print_exc()  # for whoever reads the output of a job that failed
            print(f"case {_case}: {time.monotonic() - began:.2f} s", file=sys.stderr, flush=True)
        return function

    return run


def report() -> None:
    print("RESULT " + json.dumps({"rank": R, **_results}), flush=True)


def compressor(scheme: str, **keys: Any) -> Any:
    """`scheme` on every tensor of two dimensions or more, whatever its size; a small ratio, for tensors are small."""
    ratio = {"topk": 8, "scalecom": 8, "randomk": 8}.get(scheme)
    return getattr(Compression, scheme)(**{"min_numel": 0, **({"ratio": ratio} if ratio else {}), **keys})


def chosen(scheme: str, **keys: Any) -> Any:
    """Horovod's own for "stock"; everything dense, by our machinery, for "exempt"; else `compressor(scheme)`."""
    if scheme == "stock":
        return STOCK
    return Compression.topk(exempt=["*"]) if scheme == "exempt" else compressor(scheme, **keys)


def rate(scheme: str, lr: float = 0.1) -> float:
    """A learning rate; cascading SSDM multiplies norms, and diverges at ordinary ones."""
    return 1e-5 if scheme == "cascading_ssdm" else lr


def everything() -> Any:
    """Top-k that keeps every value: the machinery of compression, the result of dense."""
    return Compression.topk(ratio=1, min_numel=0)


def wrap(model: nn.Module, compression: Any, lr: float = 0.1, base: Any = None, tag: str = "", **options: Any) -> Any:
    """`hvd.DistributedOptimizer` on plain SGD, or on `base`.

    The case stands before the names, so that one that failed leaves no operation in flight that the next would meet.
    """
    base = torch.optim.SGD(model.parameters(), lr=lr) if base is None else base
    named = [(f"{_case}.{tag}{name}", p) for name, p in model.named_parameters()]
    return hvd.DistributedOptimizer(base, named_parameters=named, compression=compression, **options)


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 40), nn.Tanh(), nn.Linear(40, 40), nn.Tanh(), nn.Linear(40, 4))


def batch(step: int, rows: int = 8, width: int = 16) -> Tensor:
    """Inputs that differ by rank and step."""
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(1000 * R + step))


def loss_of(model: nn.Module, step: int) -> Tensor:
    return model(batch(step)).square().mean()


def train(model: nn.Module, opt: Any, steps: Any) -> None:
    """As the tutorials have it."""
    for step in range(steps) if isinstance(steps, int) else steps:
        opt.zero_grad()
        loss_of(model, step).backward()
        opt.step()


def bits(model: nn.Module) -> list[Tensor]:
    """A copy of every parameter."""
    return [p.detach().clone() for p in model.parameters()]


def gap(a: Tensor, b: Tensor) -> float:
    """Largest difference of two elements: 0.0 for equal tensors only, infinite where one is not a number."""
    return float((a.detach().double() - b.detach().double()).abs().nan_to_num(nan=float("inf")).max())


def changed(before: list[Tensor], model: nn.Module) -> float:
    """Largest difference of a parameter to what it was."""
    return max(gap(a, b) for a, b in zip(before, model.parameters()))


def distance(a: nn.Module, b: nn.Module) -> float:
    return changed(bits(a), b)


def identical(model: nn.Module) -> bool:
    """Do all ranks hold the same bits?"""
    flat = torch.cat([p.detach().reshape(-1).double() for p in model.parameters()]).view(1, -1)
    everyone = hvd.allgather(flat, name=_case + ".identical")
    return bool((everyone == everyone[0]).all())


def mean_over_ranks(x: Tensor) -> Tensor:
    """The average in fp64, by an operation of Horovod's own that is not a gradient's."""
    return hvd.allgather(x.detach().double().unsqueeze(0), name=_case + ".mean").mean(0)
