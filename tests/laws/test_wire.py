"""What a scheme says that it sends is what its operations are traced to send, and what transports count."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from compression_plugins.core.call import Segment
from compression_plugins.engine.plan import Bucket, TensorSpec, make_plan
from compression_plugins.engine.reducer import Reducer
from compression_plugins.schemes import registry
from compression_plugins.schemes.trace import traced_bits
from compression_plugins.transports.local import LocalWorld, drive

from ..world import config
from .test_reduction import CASES

#: Schemes that send the same in every step, in every form.
STEADY = [case for case in CASES if case.values[0] != "marsit"]
STEADY += [pytest.param("scalecom", {"values": v, "selection": "exact"}, id=f"scalecom-exact-{v}") for v in ("bf16",)]


@pytest.mark.parametrize("size", [2, 3, 4, 5])
@pytest.mark.parametrize(("name", "variant"), STEADY)
def test_the_formula_of_the_wire_is_what_one_rank_is_traced_to_send(name: str, variant: dict, size: int) -> None:
    scheme = config(name, **variant).scheme
    for shapes in ([(37, 50), (30, 41)], [(1, 1)], [(3, 11)], [(31, 33), (7,)], [(1, 1025)], [(65, 64)]):
        segments = []
        for i, shape in enumerate(shapes):
            numel = int(torch.Size(shape).numel())
            segments.append(Segment(f"w{i}", 0, numel, shape, numel // shape[0] if len(shape) > 1 else 0))
        assert traced_bits(scheme.mean, segments, size) == pytest.approx(scheme.wire_bits(segments, size), rel=1e-9), (
            shapes
        )


@pytest.mark.parametrize(("name", "variant"), CASES)
def test_a_reduce_scatter_sends_what_its_formula_says(name: str, variant: dict) -> None:
    """But for what is rounded up, or said once, in each shard."""
    cfg, size = config(name, **variant), 3
    if "scatter_mean" not in cfg.scheme.operations:
        pytest.skip("what each rank remembers is relative to the whole average")
    reducers = [Reducer(cfg, transport) for transport in LocalWorld(size).transports]
    (bucket,) = make_plan(cfg, [TensorSpec("w", (60 * size, 64), "float32")]).buckets
    bucket = replace(bucket, sharded=True)
    generator = torch.Generator().manual_seed(0)
    gradients = [torch.randn(bucket.numel, generator=generator) for _ in range(size)]
    drive([reducer.start(bucket, x, [60 * 64] * size) for reducer, x in zip(reducers, gradients)])
    counted = sum(reducer.transport.sent for reducer in reducers) / size
    assert counted == pytest.approx(bucket.wire_bytes(size), rel=0.02)


def test_an_empty_bucket_sends_nothing() -> None:
    for name in registry.names():
        assert Bucket(config(name).scheme, (Segment("w", 0, 0, (0, 3), 3),)).wire_bytes(3) == 0


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize(("name", "variant"), CASES)
def test_transports_count_what_the_buckets_of_a_plan_say(name: str, variant: dict, size: int) -> None:
    """Several buckets and dtypes, what is exempt among them."""
    cfg = config(name, exempt=["exempt*"], bucket_mb=0.004, **variant)
    shapes = {"a": (20, 31), "b": (30, 41), "bias": (33,), "exempt": (25, 5), "empty": (0, 4)}
    dtypes = ["float32", "bfloat16", "float16", "float64"]
    specs = [TensorSpec(f"{n}.{dtype}", shape, dtype) for n, shape in shapes.items() for dtype in dtypes]
    specs = [spec._replace(name=f"exempt.{spec.name}") if "exempt" in spec.name else spec for spec in specs]
    plan = make_plan(cfg, specs)
    assert {b.dtype for b in plan.buckets} == set(dtypes) and len(plan.buckets) > 6
    reducers = [Reducer(cfg, transport) for transport in LocalWorld(size).transports]
    steps = 3  # one period of the short setting
    for step in range(steps):
        works = []
        for rank, reducer in enumerate(reducers):
            generator = torch.Generator().manual_seed(10 * step + rank)
            for bucket in plan.buckets:
                own = getattr(torch, bucket.dtype) if bucket.scheme.host_dense else torch.float32
                works.append(reducer.start(bucket, torch.randn(bucket.numel, generator=generator).to(own)))
        drive(works)
        for reducer in reducers:
            reducer.end_step()
    counted = sum(reducer.transport.sent for reducer in reducers) / size / steps
    assert counted == pytest.approx(sum(bucket.wire_bytes(size) for bucket in plan.buckets), rel=1e-9)
