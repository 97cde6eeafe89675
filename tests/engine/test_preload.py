"""Warming up runs what the first steps will run, alone, and leaves no trace."""

from __future__ import annotations

import pytest
import torch

from compression_plugins import triton_kernels as K
from compression_plugins.engine.plan import TensorSpec, make_plan
from compression_plugins.engine.preload import preload
from compression_plugins.engine.reducer import Reducer
from compression_plugins.schemes import registry
from compression_plugins.transports.echo import EchoTransport
from tests.world import config


def plan_of(settings):
    return make_plan(settings, [TensorSpec("weight", (64, 64), "float32")])


@pytest.mark.parametrize("name", registry.names())
@pytest.mark.parametrize("rank, size, sharded", [(0, 2, False), (1, 2, True), (2, 3, False), (4, 6, True)])
def test_every_scheme_runs_alone_on_any_rank(name, rank, size, sharded):
    settings = config(name, warmup_steps=2)
    preload(settings, plan_of(settings), rank, size, sharded)


def test_the_kernels_of_the_first_steps_have_been_called(monkeypatch):
    called = set()
    for kernel in (
        "uniform_encode",
        "uniform_decode",
        "uniform_reduce",
        "uniform_round",
        "one_hot_signs",
        "chunk_select",
    ):
        original = getattr(K, kernel)
        monkeypatch.setattr(K, kernel, lambda *a, k=kernel, f=original, **kw: called.add(k) or f(*a, **kw))
    for name in ("double_quantization", "marsit", "scalecom"):
        settings = config(name, bucket_mb=2)  # a long message, by owners, and a short one, gathered
        specs = [TensorSpec("long", (1024, 512), "float32"), TensorSpec("short", (64, 64), "float32")]
        plan = make_plan(settings, specs)
        assert len(plan.buckets) == 2
        preload(settings, plan, 1, 3)
    assert called == {
        "uniform_encode", "uniform_decode", "uniform_reduce", "uniform_round", "one_hot_signs", "chunk_select"
    }  # fmt: skip


def test_ranks_that_all_send_the_same_average_to_it():
    settings = config("none")
    (bucket,) = plan_of(settings).buckets
    x = torch.randn(bucket.numel)
    torch.testing.assert_close(Reducer(settings, EchoTransport(1, 4)).reduce(bucket, x.clone()), x)
