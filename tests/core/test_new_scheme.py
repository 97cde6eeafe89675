"""A new scheme is one file and one YAML: everything else picks it up."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

TOY = '''
"""Toy: halves travel as 8-bit codes."""

from collections.abc import Mapping
from typing import Any, ClassVar

from ..codecs import Codec, Uniform
from ..optimizer.hooks import StepHook
from .base import Scheme
from .registry import register


@register
class Toy(Scheme):
    name: ClassVar[str] = "toy"
    paper: ClassVar[str] = "-"

    @property
    def codec(self) -> Codec:
        return Uniform(8, 64)

    def step_hook(self, parameters: Mapping[str, Any], seed: int) -> "Diary":
        return Diary(parameters)


class Diary(StepHook):
    def __init__(self, parameters: Mapping[str, Any]) -> None:
        self.log = [*parameters]

    def before_forward(self) -> None:
        self.log.append("forward")

    def after_backward(self) -> None:
        self.log.append("backward")

    def after_step(self, step: int, optimizer: Any = None) -> None:
        self.log.append(f"step {step}")

    def state_dict(self) -> dict[str, Any]:
        return {"entries": len(self.log)}
'''

SESSION = """
import torch
from compression_plugins.config import Config
from compression_plugins.engine.session import Session
from compression_plugins.transports.echo import EchoTransport

session = Session("host", Config.load("toy"), {"weight": torch.zeros(64, 64), "bias": torch.zeros(64)})
session.preload(0, 2)
session.start(EchoTransport(0, 2))
session.make_hooks()
session.opened()
for _ in range(2):
    session.before_forward()
    for bucket in session.plan.buckets:
        session.reducer.reduce(bucket, torch.ones(bucket.numel))
    session.after_backward()
    session.end_step()
print(session.hooks[0].log, session.state_dict()["hooks"])
"""


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the project with a toy scheme added."""
    path = tmp_path_factory.mktemp("house")
    ignore = shutil.ignore_patterns("__pycache__", ".git", ".venv", "out", "*.egg-info")
    for name in ("compression_plugins", "triton_kernels", "configs", "tests"):
        shutil.copytree(ROOT / name, path / name, symlinks=True, ignore=ignore)
    (path / "compression_plugins/schemes/toy.py").write_text(TOY)
    (path / "configs/toy.yaml").write_text("scheme: toy\n")
    return path


def run(house: Path, *command: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(house)}
    done = subprocess.run([sys.executable, *command], cwd=house, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


@pytest.mark.nightly
def test_one_file_and_one_yaml_reach_the_lists_the_laws_and_the_benchmark(house: Path) -> None:
    assert "toy" in run(house, "-m", "compression_plugins", "schemes")
    row = next(
        line for line in run(house, "-m", "compression_plugins", "schemes", "--markdown").splitlines() if "toy" in line
    )
    assert row == "| `toy` | Toy: halves travel as 8-bit codes. | - | 8.5 / 14.9 | - |"
    laws = run(house, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/laws", "-k", "toy and not odd")
    assert " passed" in laws and " 0 passed" not in laws
    bench = "-m", "compression_plugins", "bench", "schemes", "--schemes", "toy", "--numel", "4096", "--steps", "1"
    assert "\ntoy " in run(house, *bench)


@pytest.mark.nightly
def test_its_step_hook_reaches_the_session_of_every_host(house: Path) -> None:
    once = ["forward", "backward"]
    log = ["weight", *once, "step 0", *once, "step 1"]
    assert run(house, "-c", SESSION).strip() == f"{log} {[{'entries': len(log)}]}"
