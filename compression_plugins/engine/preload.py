"""Loads the kernels that a plan needs before the first step does."""

from __future__ import annotations

from dataclasses import replace

import torch

from ..config import Config
from ..optimizer.directions import GRADIENT
from ..transports.echo import EchoTransport
from .plan import Bucket, Plan
from .reducer import Reducer

_SHAPE = (64, 64)
_STEPS = 3  # a flush, a leader, a follower


def preload(config: Config, plan: Plan, rank: int, size: int, sharded: bool = False) -> None:
    """Reduce gradients of ones with each scheme of `plan`, alone: its shortest bucket and its longest, for short
    messages may meet in another way than long ones.

    Compiling kernels takes seconds, and loading compiled ones from their cache one or two: in the first step that would
    count as training, and a rank that compiles would keep the others waiting.

    Args:
        sharded: as a reduce-scatter, the form that ZeRO uses, rather than an all-reduce.
    """
    config = config.model_copy(update={"direction": GRADIENT, "levels": None})  # others may begin with dense steps
    compressed = [replace(b, direction=GRADIENT) for b in plan.buckets if not b.scheme.host_dense]
    for scheme, device in dict.fromkeys((bucket.scheme, bucket.device) for bucket in compressed):
        lengths = {b.numel: b for b in compressed if (b.scheme, b.device) == (scheme, device)}
        for numel in {min(lengths), max(lengths)}:
            _reduce(config, lengths[numel], EchoTransport(rank, size), sharded)
        parameter = torch.ones(_SHAPE, device=device)
        hook = None if sharded else scheme.step_hook({"preload": parameter}, config.seed)
        if hook is not None:
            for step in range(_STEPS):
                hook.before_forward()
                hook.after_backward()
                parameter.mul_(2)
                hook.after_step(step)


def _reduce(config: Config, bucket: Bucket, transport: EchoTransport, sharded: bool) -> None:
    size, numel = transport.size, bucket.numel
    shards = [numel // size + (i < numel % size) for i in range(size)] if sharded else None
    if "scatter_mean" not in bucket.scheme.operations:
        shards = None
    reducer = Reducer(config, transport)
    reducer.step = config.warmup_steps  # past the dense ones
    for _ in range(_STEPS):
        reducer.reduce(bucket, torch.ones(numel, device=bucket.device), shards)
        reducer.end_step()
