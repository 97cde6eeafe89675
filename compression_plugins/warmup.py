"""Loads the kernels that a plan needs before the first step does."""

from __future__ import annotations

import torch

from .config import Config
from .plan import Bucket, Plan
from .reducer import Reducer
from .schemes.double_quantization import DoubleQuantization
from .transports.echo import EchoTransport
from .weights import QuantizedWeights

_SHAPE = (64, 64)
_STEPS = 3  # a flush, a leader, a follower


def warm_up(config: Config, plan: Plan, rank: int, size: int, sharded: bool = False) -> None:
    """Reduce gradients of ones with each scheme of `plan`, alone: its shortest bucket and its longest, for short
    messages may meet in another way than long ones.

    Compiling kernels takes seconds, and loading compiled ones from their cache one or two: in the first step that would
    count as training, and a rank that compiles would keep the others waiting.

    Args:
        sharded: as a reduce-scatter, the form that ZeRO uses, rather than an all-reduce.
    """
    compressed = [bucket for bucket in plan.buckets if not bucket.scheme.host_dense]
    for scheme, device in dict.fromkeys((bucket.scheme, bucket.device) for bucket in compressed):
        lengths = {b.numel: b for b in compressed if (b.scheme, b.device) == (scheme, device)}
        for numel in {min(lengths), max(lengths)}:
            _reduce(config, lengths[numel], EchoTransport(rank, size), sharded)
        if isinstance(scheme, DoubleQuantization) and scheme.weights and not sharded:
            parameter = torch.ones(_SHAPE, device=device)
            weights = QuantizedWeights(scheme, [("warm-up", parameter)])
            weights.quantize(0)
            parameter.mul_(2)  # away from the snapshot
            weights.quantize(1)


def _reduce(config: Config, bucket: Bucket, transport: EchoTransport, sharded: bool) -> None:
    size, numel = transport.size, bucket.numel
    shards = [numel // size + (i < numel % size) for i in range(size)] if sharded else None
    reducer = Reducer(config, transport)
    reducer.step = config.warmup_steps  # past the dense ones
    for _ in range(_STEPS):
        reducer.reduce(bucket, torch.ones(numel, device=bucket.device), shards)
        reducer.end_step()
