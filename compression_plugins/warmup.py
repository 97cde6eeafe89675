"""Loads the kernels that a plan needs before the first step does."""

from __future__ import annotations

import torch

from .config import Config
from .plan import Bucket, Plan
from .reducer import Reducer
from .schemes.base import Segment
from .schemes.double_quantization import DoubleQuantization
from .transports.echo import EchoTransport
from .weights import QuantizedWeights

_SHAPE = (64, 64)
_STEPS = 3  # a flush, a leader, a follower


def warm_up(config: Config, plan: Plan, rank: int, size: int, sharded: bool = False) -> None:
    """Reduce a small gradient with each scheme of `plan`, alone.

    Compiling kernels takes seconds, and loading compiled ones from their cache one or two: in the first step that would
    count as training, and a rank that compiles would keep the others waiting.

    Args:
        sharded: as a reduce-scatter, the form that ZeRO uses, rather than an all-reduce.
    """
    numel = _SHAPE[0] * _SHAPE[1]
    shards = [numel // size + (i < numel % size) for i in range(size)] if sharded else None
    compressed = [bucket for bucket in plan.buckets if not bucket.scheme.host_dense]
    for scheme, device in dict.fromkeys((bucket.scheme, bucket.device) for bucket in compressed):
        bucket = Bucket(scheme, (Segment("warm-up", 0, numel, _SHAPE),), device)
        reducer = Reducer(config, EchoTransport(rank, size))
        reducer.step = config.warmup_steps  # past the dense ones
        for _ in range(_STEPS):
            reducer.reduce(bucket, torch.ones(numel, device=device), shards)
            reducer.end_step()
        if isinstance(scheme, DoubleQuantization) and scheme.weights and not sharded:
            parameter = torch.ones(_SHAPE, device=device)
            weights = QuantizedWeights(scheme, [("warm-up", parameter)])
            weights.quantize(0)
            parameter.mul_(2)  # away from the snapshot
            weights.quantize(1)
