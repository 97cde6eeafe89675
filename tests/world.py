"""N reducers in one process, for tests."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from compression_plugins.config import Config
from compression_plugins.engine.plan import Bucket, TensorSpec, make_plan
from compression_plugins.engine.reducer import Reducer
from compression_plugins.transports.local import LocalWorld, drive

SHAPES = {"first.weight": (37, 50), "second.weight": (30, 41)}

#: A small setting for every scheme that needs one to show its law in a short test.
SHORT: dict[str, dict[str, Any]] = {
    "marsit": {"flush_steps": 3},
    "scalecom": {"ratio": 10, "beta": 0.5},
    "topk": {"ratio": 10.0},
    "chunk_topk": {"ratio": 10, "block": 64},
    "randomk": {"ratio": 10},
    "qsgd": {"block": 64},
    "double_quantization": {"block": 64},
    "ef_signsgd": {"block": 64},
    "ecq_sgd": {"block": 64},
    "fp8": {"block": 64},
}


def config(scheme: str, **overrides: Any) -> Config:
    """`scheme` in its short setting, compressing tensors of every size."""
    return Config.load({"scheme": scheme, "min_numel": 0, **SHORT.get(scheme, {}), **overrides})


class World:
    """Reducers of `size` ranks over one plan; `step` averages one gradient a rank."""

    def __init__(self, config: Config, size: int, shapes: Mapping[str, tuple[int, ...]] = SHAPES) -> None:
        self.size, self.local = size, LocalWorld(size)
        self.reducers = [Reducer(config, transport) for transport in self.local.transports]
        draw = torch.Generator().manual_seed(99)
        self.weights = {name: torch.randn(shape, generator=draw) for name, shape in shapes.items()}
        for reducer in self.reducers:
            reducer.parameters = self.weights
        self.plan = make_plan(config, [TensorSpec(name, shape, "float32") for name, shape in shapes.items()])

    @property
    def bucket(self) -> Bucket:
        (bucket,) = self.plan.buckets
        return bucket

    def gradients(self, seed: int) -> list[Tensor]:
        """A different gradient for each rank, around one that they share."""
        generator = torch.Generator().manual_seed(seed)
        shared = torch.randn(self.bucket.numel, generator=generator)
        return [shared + torch.randn(self.bucket.numel, generator=generator) for _ in range(self.size)]

    def reduce(
        self,
        gradients: Sequence[Tensor],
        shards: Sequence[int] | None = None,
        absent: Sequence[Collection[str]] | None = None,
    ) -> list[Tensor]:
        lacks = [frozenset(names) for names in absent or [()] * self.size]
        jobs = [r.start(self.bucket, g.clone(), shards, a) for r, g, a in zip(self.reducers, gradients, lacks)]
        drive(jobs)
        return [job.result() for job in jobs]

    def step(self, gradients: Sequence[Tensor], skipped: bool = False) -> list[Tensor]:
        results = self.reduce(gradients)
        for reducer in self.reducers:
            reducer.end_step(skipped)
        return results

    def memory(self) -> Tensor:
        """Mean of the ranks' residuals, in float64."""
        return torch.stack([r.state.kept(self.bucket) for r in self.reducers]).double().mean(0)


def mean(gradients: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(gradients)).double().mean(0)


def assert_same(a: Any, b: Any) -> None:
    """Two states hold the same bits."""
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key])
    else:
        assert torch.equal(a, b) if isinstance(a, Tensor) else a == b


def written(state: Mapping[str, Any]) -> dict[str, Any]:
    """A reducer's state without memory that is zeros: it may have a place before anything is written to it."""
    vectors = {
        slot: {name: parts for name, parts in named.items() if any(part.any() for part in parts.values())}
        for slot, named in state["vectors"].items()
    }
    state = {key: value for key, value in state.items() if key != "checksum"}
    return {**state, "vectors": {slot: named for slot, named in vectors.items() if named}}
