"""AsyncTrainer on modules, loaders and processes; the launcher."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset

from compression_plugins.errors import CompressionError, ConfigError, UnsupportedError
from compression_plugins.parameter_server import AsyncTrainer
from compression_plugins.parameter_server.problem import Problem

from .world import data, linear

ROOT = Path(__file__).parents[2]
FAST: dict[str, Any] = {"lr": 0.3, "epochs": 3, "inner_steps": 15, "workers": 2, "progress": False}


class Dictionaries(Dataset[dict[str, Tensor]]):
    """Samples of another form than (input, target)."""

    def __len__(self) -> int:
        return 90

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        x, y = data()[index]
        return {"x": x, "y": y}


def forward(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return nn.functional.cross_entropy(model(batch["x"]), batch["y"])


class Pair(NamedTuple):
    """Inputs of a model that takes two; a batch is (Pair, target)."""

    left: Tensor
    right: Tensor


class Tuples(Dictionaries):
    """Samples ((left half, right half), target, weight): tuples, nested and of three."""

    def __getitem__(self, index: int) -> Any:
        x, y = data()[index]
        return Pair(x[:5], x[5:]), y, torch.ones(())


class TwoInputs(nn.Module):
    """Takes two tensors, which no caller that knows only a batch could guess."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm, self.top = norm, linear()

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        return self.top(self.norm(torch.cat([left, right], 1)))


def weighted(model: nn.Module, batch: tuple[Pair, Tensor, Tensor]) -> Tensor:
    (left, right), targets, weights = batch
    return (nn.functional.cross_entropy(model(left, right), targets, reduction="none") * weights).mean()


class Stream(IterableDataset[Tensor]):
    def __iter__(self) -> Any:
        return iter([])


def network() -> nn.Module:
    """Convolution, normalisation, dropout, a frozen parameter and one that is used twice."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Unflatten(1, (1, 10)), nn.Conv1d(1, 4, 3), nn.BatchNorm1d(4), nn.ReLU(), nn.Dropout(0.2), nn.Flatten(),
        nn.Linear(32, 2),
    )  # fmt: skip
    net[1].bias.requires_grad_(False)  # type: ignore[union-attr]
    return net


def test_worker_processes_train_a_module_in_place() -> None:
    model, loader = linear(), DataLoader(data(), batch_size=8)
    trainer = AsyncTrainer(model, nn.functional.cross_entropy, loader, method="asylpg", **FAST)
    before = Problem(model, nn.functional.cross_entropy, loader).start()
    history = trainer.fit()
    assert trainer.options.batch_size == 8, "the loader's"
    assert [row.epoch for row in history] == [0, 1, 2]
    assert trainer.loss() < history[-1].loss < history[0].loss
    assert not torch.equal(Problem(model, nn.functional.cross_entropy, loader).start(), before)
    assert trainer.server is not None and len(trainer.server.delays) == 45


def test_a_network_with_every_kind_of_layer_learns() -> None:
    model = network()
    frozen = model[1].bias.clone()  # type: ignore[union-attr,operator]
    trainer = AsyncTrainer(
        model, nn.CrossEntropyLoss(), DataLoader(data(), batch_size=16), method="sparse_asylpg", delays=[1], **FAST
    )
    losses = [row.loss for row in trainer.fit()]
    assert losses[-1] < losses[0]
    assert torch.equal(model[1].bias, frozen)  # type: ignore[union-attr,arg-type]
    assert model[2].num_batches_tracked > 0 and model[2].running_mean.abs().sum() > 0, (  # type: ignore[union-attr,operator]
        "the statistics that evaluation needs are estimated at the end"
    )


def test_dropout_is_the_same_function_at_both_points() -> None:
    task = Problem(network(), nn.functional.cross_entropy, data())
    import numpy as np

    batch = np.arange(20)
    first, second = (task.gradient(task.start(), batch, 7)[1] for _ in range(2))
    assert torch.equal(first, second)
    assert not torch.equal(first, task.gradient(task.start(), batch, 8)[1])


def test_batches_of_any_form_with_forward() -> None:
    trainer = AsyncTrainer(linear(), None, Dictionaries(), forward=forward, delays=[0], **FAST)
    plain = AsyncTrainer(linear(), nn.functional.cross_entropy, data(), delays=[0], **FAST)
    assert [row.loss for row in trainer.fit()] == pytest.approx([row.loss for row in plain.fit()])
    with pytest.raises(CompressionError, match="give forward="):
        AsyncTrainer(linear(), nn.functional.cross_entropy, Dictionaries(), delays=[0], **FAST).fit()


def trained(kind: str, norm: nn.Module) -> AsyncTrainer:
    """A trainer after `fit`, on batches of this kind; `norm` sees the ten features."""
    if kind == "tuples":
        trainer = AsyncTrainer(TwoInputs(norm), None, Tuples(), forward=weighted, delays=[0], **FAST)
    elif kind == "dicts":
        model = nn.Sequential(norm, linear())
        loader = DataLoader(Dictionaries(), batch_size=89)  # its last batch is one sample, which cannot be normalised
        trainer = AsyncTrainer(model, None, loader, forward=forward, delays=[0], snapshot_batch=89, **FAST)
    else:
        trainer = AsyncTrainer(nn.Sequential(norm, linear()), nn.CrossEntropyLoss(), data(), delays=[0], **FAST)
    assert len(trainer.fit()) == FAST["epochs"]
    return trainer


@pytest.mark.parametrize("kind", ["pairs", "dicts", "tuples"])
def test_running_statistics_are_those_of_all_data_for_batches_of_any_form(kind: str) -> None:
    norm, inputs = nn.BatchNorm1d(10, momentum=0.3), data().tensors[0]
    trained(kind, norm)
    assert torch.allclose(norm.running_mean, inputs.mean(0), atol=1e-6)  # type: ignore[arg-type]
    assert torch.allclose(norm.running_var, inputs.var(0), rtol=0.1)  # type: ignore[arg-type]
    assert norm.momentum == 0.3 and norm.training


@pytest.mark.parametrize("kind", ["pairs", "dicts", "tuples"])
def test_a_model_without_batch_normalisation_is_not_run_once_more(kind: str) -> None:
    calls = []
    norm = nn.Identity()
    norm.register_forward_hook(lambda module, *_: calls.append(1) if module is norm else None)
    trainer = trained(kind, norm)
    assert not calls, "training uses a copy, and nothing is estimated at the end"
    assert trainer.loss() < 0.6


def test_frozen_batch_normalisation_keeps_the_statistics_it_was_trained_with() -> None:
    norm = nn.BatchNorm1d(10).eval()
    trained("dicts", norm)
    assert not norm.running_mean.any() and not norm.training  # type: ignore[union-attr]


def test_a_checkpoint_continues_bit_for_bit(tmp_path: Path) -> None:
    whole, parts = linear(), linear()
    AsyncTrainer(whole, nn.functional.cross_entropy, data(), delays=[1, 0], **{**FAST, "epochs": 4}).fit()
    path = tmp_path / "server.pt"
    for epochs in (2, 4):
        trainer = AsyncTrainer(
            parts, nn.functional.cross_entropy, data(), delays=[1, 0], checkpoint=path, **{**FAST, "epochs": epochs}
        )
        history = trainer.fit()
    assert len(history) == 4
    assert torch.equal(whole.weight, parts.weight) and list(tmp_path.iterdir()) == [path]  # type: ignore[arg-type]
    path.write_bytes(b"garbage")
    with pytest.raises(CompressionError, match="cannot read the checkpoint"):
        trainer.fit()


def test_what_cannot_work_is_refused_before_anything_starts() -> None:
    loss = nn.functional.cross_entropy
    with pytest.raises(UnsupportedError, match="cannot be indexed"):
        AsyncTrainer(linear(), loss, DataLoader(Stream()))
    with pytest.raises(UnsupportedError, match="0 parameters"):
        AsyncTrainer(nn.ReLU(), loss, data())
    with pytest.raises(ConfigError, match="did you mean 'epochs'"):
        AsyncTrainer(linear(), loss, data(), epoch=3)
    with pytest.raises(ConfigError, match="does not exist"):
        AsyncTrainer(linear(), loss, data(), checkpoint="/nowhere/server.pt")
    with pytest.raises(CompressionError, match="give loss_fn"):
        AsyncTrainer(linear(), None, data())
    with pytest.raises(ConfigError, match="instead of lambdas"):
        AsyncTrainer(linear(), lambda a, b: loss(a, b), data(), **FAST).fit()
    with pytest.raises(CompressionError, match="a scalar"):
        AsyncTrainer(linear(), nn.CrossEntropyLoss(reduction="none"), data(), delays=[0], **FAST).fit()


def launch(*arguments: str, **environment: str) -> subprocess.Popen[str]:
    import os

    return subprocess.Popen(
        [sys.executable, "-m", "launch.parameter_server", *arguments],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env={**os.environ, **environment},
    )  # fmt: skip


TASK = ["--task", "tests.parameter_server.task:tiny", "--set", "workers=2", "epochs=2", "inner_steps=10", "lr=0.3"]


def test_the_launcher_runs_server_and_workers_of_one_machine(tmp_path: Path) -> None:
    process = launch(*TASK, "--config", "configs/parameter_server/asylpg.yaml", "--out", str(tmp_path / "model.pt"))
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 0, out
    assert "20 updates" in out
    assert set(torch.load(tmp_path / "model.pt", weights_only=True)) == {"weight", "bias"}


def test_the_launcher_runs_one_role_a_host() -> None:
    secret = {"COMPRESSION_PLUGINS_TOKEN": "0123456789abcdef0123"}
    server = launch(*TASK, "--role", "server", "--listen", "127.0.0.1:0", **secret)
    assert server.stdout is not None
    line = ""
    while "listening on" not in line:
        line = server.stdout.readline()
        assert line, "the server ended early"
    address = line.rsplit(" ", 1)[1].strip()
    workers = [
        launch(*TASK, "--role", "worker", "--rank", str(rank), "--connect", address, **secret) for rank in (0, 1)
    ]
    for worker in workers:
        out, _ = worker.communicate(timeout=120)
        assert worker.returncode == 0 and "the run is complete" in out, out
    out, _ = server.communicate(timeout=60)
    assert server.returncode == 0 and "20 updates" in out, out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--role", "worker", "--rank", "0", "--connect", "127.0.0.1:1"], "COMPRESSION_PLUGINS_TOKEN"),
        (["--set", "epoch=3"], "did you mean 'epochs'"),
        (["--task", "nowhere:x"], "nowhere"),
        (["--role", "worker"], "--connect"),
    ],
)
def test_a_mistake_on_the_command_line_is_one_sentence(arguments: list[str], message: str) -> None:
    process = launch("--task", "tests.parameter_server.task:tiny", *arguments)
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 2 and message in out and "Traceback" not in out, out


def test_a_problem_keeps_where_it_started() -> None:
    task = Problem(linear(), nn.functional.cross_entropy, data())
    before = task.start()
    task.loss(before + 1)
    assert torch.equal(task.start(), before)
