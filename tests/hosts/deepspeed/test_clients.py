"""Unmodified scripts of Hugging Face's Trainer and of Accelerate, and Lightning's way to a config."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from .job import HERE, SCRIPTS
from .job import deepspeed as run

pytest.importorskip("deepspeed")
pytest.importorskip("transformers")
pytest.importorskip("accelerate")

#: Every "auto" that this package knows, in the formats that Trainer is given; and an old config.
TRAINER = {
    "ds.yaml": """\
train_micro_batch_size_per_gpu: auto
gradient_accumulation_steps: auto
optimizer: {type: AdamW, params: {lr: auto, torch_adam: true}}
zero_optimization: {stage: 1}
steps_per_print: 1000
communication_compression: {scheme: marsit, eta_s: auto, rows: auto, bucket_mb: auto, flush_steps: 2, min_numel: 0}
""",
    "bf16.json": json.dumps({
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "bf16": {"enabled": "auto"},
        "optimizer": {"type": "AdamW", "params": {"lr": "auto", "torch_adam": True}},
        "zero_optimization": {"stage": 2},
        "steps_per_print": 1000,
        "communication_compression": {"scheme": "ecq_sgd", "bucket_mb": "auto", "min_numel": 0},
    }),
    "one_bit.json": json.dumps({
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "zero_optimization": {"stage": 0},
        "optimizer": {"type": "OneBitAdam", "params": {"lr": "auto", "freeze_step": 2}},
        "steps_per_print": 1000,
    }),
}  # fmt: skip
ACCELERATE = """\
train_micro_batch_size_per_gpu: auto
gradient_accumulation_steps: auto
zero_optimization: {stage: 2}
zero_allow_untested_optimizer: true
steps_per_print: 1000
communication_compression: {scheme: ecq_sgd, bucket_mb: auto, min_numel: 0}
"""

pytestmark = pytest.mark.nightly


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[dict[str, Any]], str]:
    folder = tmp_path_factory.mktemp("trainer")
    for name, text in TRAINER.items():
        (folder / name).write_text(text)
    job = run("trainer.py", folder, *TRAINER, folder=folder, timeout=290)
    assert job.returncode == 0, job.stdout[-20000:]
    return [json.loads((folder / f"trainer{rank}.json").read_text()) for rank in range(2)], job.stdout


@pytest.mark.parametrize("name", TRAINER)
def test_an_unmodified_trainer_script_learns_compressed_and_resumes_bit_for_bit(
    trained: tuple[list[dict[str, Any]], str], name: str
) -> None:
    ranks, _ = trained
    whole, resumed = ranks[0][name], ranks[0][f"{name} resumed"]
    assert whole["losses"][-1] < whole["losses"][0]
    assert whole["weights"] == ranks[1][name]["weights"] == resumed["weights"]
    assert resumed["losses"][-3:] == whole["losses"][-3:]


def test_trainer_says_what_travels(trained: tuple[list[dict[str, Any]], str]) -> None:
    for line in (
        "marsit on 2 ranks, ZeRO stage 1",
        "ecq_sgd on 2 ranks, ZeRO stage 2",
        "OneBitAdam: dense for 2 steps",
    ):
        assert line in trained[1]


def test_accelerate_launch_trains_adapters_compressed_and_load_state_continues_bit_for_bit(tmp_path: Path) -> None:
    (tmp_path / "ds.yaml").write_text(ACCELERATE)
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    command = [str(Path(sys.executable).with_name("accelerate")), "launch", "--use_deepspeed", "--num_processes", "2"]
    command += ["--main_process_port", str(port), "--deepspeed_config_file", "ds.yaml"]
    paths = [str(HERE / "site"), *filter(None, [os.environ.get("PYTHONPATH")])]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    job = subprocess.run(
        [*command, str(SCRIPTS / "accelerated.py"), str(tmp_path)],
        env=env, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=280,
    )  # fmt: skip
    assert job.returncode == 0, job.stdout[-20000:]
    assert "ecq_sgd on 2 ranks, ZeRO stage 2" in job.stdout
    one, other = (json.loads((tmp_path / f"accelerated{rank}.json").read_text()) for rank in range(2))
    assert one["first"] != other["first"], "each rank has data of its own"
    assert sum(one["second"]) < sum(one["first"])
    assert one["weights"] == other["weights"] == one["weights again"]
    assert one["second"] == one["again"]


def test_lightning_hands_the_block_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Its strategy insists on an accelerator, so this is its way to a config only. It reads JSON."""
    strategies = pytest.importorskip("lightning.pytorch.strategies")
    import deepspeed
    import torch

    block = {"scheme": "ecq_sgd", "bucket_mb": "auto"}
    document = {"train_micro_batch_size_per_gpu": 4, "communication_compression": block}
    (tmp_path / "ds.json").write_text(json.dumps(document))
    handed: list[dict[str, Any]] = []

    def initialize(**arguments: Any) -> tuple[Any, ...]:
        handed.append(arguments["config"])
        return None, None, None, None

    monkeypatch.setattr(deepspeed, "initialize", initialize)
    for config in (document, str(tmp_path / "ds.json")):
        strategy = strategies.DeepSpeedStrategy(config=config)
        monkeypatch.setattr(type(strategy), "root_device", torch.device("cpu"))
        strategy._setup_model_and_optimizer(torch.nn.Linear(2, 2), None)
        assert handed.pop()["communication_compression"] == block
