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

from typing import ClassVar

from ..codecs import Codec, Uniform
from .base import Scheme
from .registry import register


@register
class Toy(Scheme):
    name: ClassVar[str] = "toy"
    paper: ClassVar[str] = "-"

    @property
    def codec(self) -> Codec:
        return Uniform(8, 64)
'''


@pytest.fixture
def house(tmp_path: Path) -> Path:
    """A copy of the project with a toy scheme added."""
    ignore = shutil.ignore_patterns("__pycache__", ".git", ".venv", "out", "*.egg-info")
    for name in ("compression_plugins", "triton_kernels", "configs", "tests"):
        shutil.copytree(ROOT / name, tmp_path / name, symlinks=True, ignore=ignore)
    (tmp_path / "compression_plugins/schemes/toy.py").write_text(TOY)
    (tmp_path / "configs/toy.yaml").write_text("scheme: toy\n")
    return tmp_path


def run(house: Path, *command: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(house)}
    done = subprocess.run([sys.executable, *command], cwd=house, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


def test_one_file_and_one_yaml_reach_the_list_the_laws_and_the_benchmark(house: Path) -> None:
    assert "toy" in run(house, "-m", "compression_plugins", "schemes")
    laws = run(house, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/laws", "-k", "toy and not odd")
    assert " passed" in laws and " 0 passed" not in laws
    assert "toy" in run(house, "-m", "compression_plugins.bench", "schemes", "--schemes", "toy", "--numel", "4096")
