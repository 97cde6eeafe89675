"""Patterns of names that match nothing, or something only elsewhere in the job."""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Iterator
from typing import Any

import horovod.torch as hvd
import torch
from faults_base import batch, bits, case, changed, loss_of, net, wrap
from torch import nn

from compression_plugins.adapters.horovod import Compression


@contextlib.contextmanager
def said() -> Iterator[list[str]]:
    """What is printed on stderr, logged or warned."""
    lines: list[str] = []
    stream = io.StringIO()
    with contextlib.redirect_stderr(stream), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield lines
    lines += stream.getvalue().splitlines() + [str(warning.message) for warning in caught]


def one_step(model: nn.Module, opt: Any) -> str:
    try:
        for step in range(2):
            opt.zero_grad()
            loss_of(model, step).backward()
            opt.step()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


@case("exempt", "rules")
def a_pattern_without_a_match(key: str) -> dict[str, Any]:
    """Horovod names the tensors itself when the script gives no names; a warning, and an error by the first step."""
    model, pattern = net(), f"no_such_{key}*"
    patterns = {"exempt": [pattern]} if key == "exempt" else {"rules": [{"match": pattern, "scheme": "qsgd"}]}
    compression = Compression.load({"scheme": "topk", "min_numel": 0, **patterns})
    with said() as lines:
        opt = hvd.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), compression=compression)
        error = one_step(model, opt)
    return {"warnings": sum(pattern in line for line in lines), "error": error}


@case("exempt", "rules")
def a_pattern_that_matches_another_optimizer(key: str) -> dict[str, Any]:
    """Generator and critic under one configuration, as a launcher gives it."""
    torch.manual_seed(1)
    generator, critic = nn.Linear(16, 24), nn.Sequential(nn.Linear(24, 8), nn.Linear(8, 1))
    pattern = "*.critic.*"
    patterns = {"exempt": [pattern]} if key == "exempt" else {"rules": [{"match": pattern, "scheme": "qsgd"}]}
    compression = Compression.load({"scheme": "topk", "min_numel": 0, **patterns})
    with said() as lines:
        opt_g = wrap(generator, compression, tag="generator.")
        opt_d = wrap(critic, compression, tag="critic.")
    before = [bits(generator), bits(critic)]
    for step in range(2):
        opt_g.zero_grad()
        opt_d.zero_grad()
        critic(generator(batch(step))).square().mean().backward()
        opt_g.step()
        opt_d.step()
    moved = [changed(a, b) for a, b in zip(before, (generator, critic))]
    return {"warnings": sum(pattern in line for line in lines), "moved": moved}


@case("exempt", "rules")
def a_pattern_that_names_a_frozen_layer(key: str) -> str:
    model = net()
    model[2].requires_grad_(False)
    pattern = "*.2.weight"
    patterns = {"exempt": [pattern]} if key == "exempt" else {"rules": [{"match": pattern, "scheme": "qsgd"}]}
    opt = wrap(model, Compression.load({"scheme": "topk", "min_numel": 0, **patterns}))
    return one_step(model, opt)
