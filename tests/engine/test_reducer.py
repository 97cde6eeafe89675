"""The reducer drives any order of jobs, refuses what does not fit, and counts."""

from __future__ import annotations

import json
import re
import weakref
from pathlib import Path

import pytest
import torch

from compression_plugins.config import Config
from compression_plugins.core.seconds import Seconds
from compression_plugins.engine.plan import TensorSpec, make_plan
from compression_plugins.engine.reducer import Reducer
from compression_plugins.engine.state import reshard
from compression_plugins.engine.telemetry import Telemetry
from compression_plugins.errors import CompressionError
from compression_plugins.transports.local import LocalWorld, drive

from ..world import World, config

PAGE = Path(__file__).parents[2] / "docs" / "horovod.md"


def test_jobs_started_in_different_orders_find_each_other_by_name() -> None:
    cfg = Config.load({"scheme": "scalecom", "ratio": 10, "bucket_mb": 0.005, "min_numel": 0})
    specs = [TensorSpec(f"w{i}", (30, 40), "float32") for i in range(3)]
    plan = make_plan(cfg, specs)
    assert len(plan.buckets) == 3
    world = LocalWorld(2)
    reducers = [Reducer(cfg, t) for t in world.transports]
    gradients = {b: torch.randn(b.numel) for b in plan.buckets}
    forward = [(b, reducers[0].start(b, gradients[b].clone())) for b in plan.buckets]
    backward = [(b, reducers[1].start(b, gradients[b].clone())) for b in reversed(plan.buckets)]
    drive([job for _, job in forward + backward])
    results = dict(backward)
    for bucket, job in forward:
        assert torch.equal(job.result(), results[bucket].result())


def test_a_gradient_is_let_go_after_its_step_whoever_drove_the_job() -> None:
    world = World(config("scalecom"), 2)
    flats = world.gradients(0)
    watched = [weakref.ref(flat) for flat in flats]
    jobs = [reducer.start(world.bucket, flat) for reducer, flat in zip(world.reducers, flats)]
    drive(jobs)
    for reducer in world.reducers:
        reducer.end_step()
    del jobs, flats
    assert [flat() for flat in watched] == [None, None]


def test_wrong_shapes_and_shards_are_refused() -> None:
    world = World(config("qsgd"), 2)
    with pytest.raises(CompressionError, match="a bucket of 3080 elements was given a tensor of shape"):
        world.reducers[0].start(world.bucket, torch.zeros(3))
    with pytest.raises(CompressionError, match="do not cover 3080 elements on 2 ranks"):
        world.reducers[0].start(world.bucket, torch.zeros(3080), shards=[1, 2])


def test_an_aborted_job_has_no_result() -> None:
    world = World(config("qsgd"), 2)
    job = world.reducers[0].start(world.bucket, torch.zeros(3080))
    world.reducers[0].abort()
    with pytest.raises(CompressionError, match="aborted"):
        job.result()


def test_states_of_another_version_and_empty_lists_are_refused() -> None:
    world = World(config("topk"), 1)
    with pytest.raises(CompressionError, match="version 99 is unknown; this package reads 3"):
        world.reducers[0].load_state_dict({"version": 99})
    with pytest.raises(CompressionError, match="no state to reshard"):
        reshard([])


def test_micro_batches_of_one_step_draw_different_random_numbers() -> None:
    world = World(config("qsgd"), 2)
    gradients = world.gradients(0)
    first, second = world.reduce(gradients)[0], world.reduce(gradients)[0]
    assert not torch.equal(first, second)
    again = World(config("qsgd"), 2)
    assert torch.equal(again.reduce(gradients)[0], first), "and the same ones in a run that repeats"


def test_seconds_tell_coding_waiting_and_the_time_on_the_wire_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr("compression_plugins.core.seconds.time.perf_counter", lambda: now)
    seconds = Seconds()

    def passes(duration: float) -> None:
        nonlocal now
        now += duration

    with seconds.spent("encode"):
        passes(1)
    seconds.launched()
    passes(10)  # of computation that hides the operation
    seconds.launched()
    with seconds.spent("exposed"):
        passes(100)
    seconds.landed()
    with seconds.spent("decode"):
        passes(1000)
    seconds.landed()
    passes(10000)  # nothing is in flight
    assert (seconds.encode, seconds.exposed, seconds.decode, seconds.wire) == (1, 100, 1000, 1110)


def test_telemetry_writes_one_line_a_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "logs" / "run.jsonl"
    monkeypatch.setenv("COMPRESSION_PLUGINS_TELEMETRY", str(path))
    assert Telemetry.from_environment(rank=1) is None
    world = World(config("scalecom"), 2)
    world.reducers[0].telemetry = Telemetry.from_environment(rank=0)
    norms = []
    for step in range(11):
        world.step(world.gradients(step))
        norms.append(world.reducers[0].state.norm())
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 12))
    bits = 8 * world.bucket.wire_bytes(2)
    assert sum(line["sent_bytes"] for line in lines) == pytest.approx(11 * bits / 8, rel=0.03)
    assert all(line["ratio"] == pytest.approx(32 * 3080 / bits, rel=0.01) for line in lines)
    assert all(line["encode_s"] > 0 and line["decode_s"] > 0 for line in lines)
    assert lines[-1]["state_bytes"] == world.reducers[0].state.nbytes() >= 4 * 3080
    assert [line["residual_norm"] for line in lines] == pytest.approx([norms[0], *[None] * 9, norms[10]])
    first_cells = re.findall(r"^\| (`.*?) \|", PAGE.read_text(), re.M)
    explained = {word for cell in first_cells for word in re.findall(r"`(\w+)`", cell)}
    assert set(lines[0]) <= explained, "docs/horovod.md says what every field means"
