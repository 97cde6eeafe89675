"""Compiled kernels lie in the user's cache folder, under a name that changes with any of their sources."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import compression_plugins.triton_kernels.cpu as cpu
from compression_plugins.triton_kernels.cpu import _jit

SOURCES = Path(cpu.__file__).parent
COUNT = """
import torch
from compression_plugins import triton_kernels as K
from compression_plugins.triton_kernels.cpu import _jit, pack
K.scatter_add(torch.zeros(1, dtype=torch.int32), torch.ones(1), torch.zeros(1))
from compression_plugins.triton_kernels.cpu import scatter
hits = sum(sum(f.stats.cache_hits.values()) for f in vars(scatter).values() if hasattr(f, "stats"))
print(_jit.cache_folder(), hits)
"""


def run(**environment: str) -> tuple[str, int]:
    """Where a process keeps kernels, and how many of them it has found there."""
    names = ("NUMBA_CACHE_DIR", "COMPRESSION_PLUGINS_CACHE", "XDG_CACHE_HOME")
    env = {k: v for k, v in os.environ.items() if k not in names} | environment
    done = subprocess.run([sys.executable, "-c", COUNT], env=env, capture_output=True, text=True, check=True)
    folder, hits = done.stdout.split()
    return folder, int(hits)


def test_kernels_are_found_again_in_the_users_cache_and_not_beside_the_sources(tmp_path: Path) -> None:
    before = sorted(SOURCES.rglob("*.nb?"))
    home = {"HOME": str(tmp_path)}
    folder, hits = run(**home)
    assert folder == str(tmp_path / ".cache/compression_plugins/kernels" / _jit.key()) and hits == 0
    assert list(Path(folder).rglob("*.nbi"))
    assert run(**home) == (folder, 1)
    assert sorted(SOURCES.rglob("*.nb?")) == before


def folder_of(monkeypatch: pytest.MonkeyPatch, **environment: str) -> str | None:
    for name in ("COMPRESSION_PLUGINS_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    return _jit.cache_folder.__wrapped__()


def test_the_variables_that_move_caches_are_honoured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    key, there = _jit.key(), str(tmp_path)
    monkeypatch.setattr(_jit.config, "CACHE_DIR", "")
    assert folder_of(monkeypatch, XDG_CACHE_HOME=there) == f"{there}/compression_plugins/kernels/{key}"
    assert folder_of(monkeypatch, COMPRESSION_PLUGINS_CACHE=there) == f"{there}/kernels/{key}"
    assert folder_of(monkeypatch, COMPRESSION_PLUGINS_CACHE="") is None
    monkeypatch.setattr(_jit.config, "CACHE_DIR", there)  # NUMBA_CACHE_DIR
    assert folder_of(monkeypatch) == f"{there}/compression_plugins-{key}"


def test_without_a_home_they_lie_in_a_folder_that_nobody_else_can_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_jit.config, "CACHE_DIR", "")
    monkeypatch.setattr(_jit.tempfile, "gettempdir", lambda: str(tmp_path))
    own = tmp_path / f"compression_plugins-{os.getuid()}"
    assert folder_of(monkeypatch, HOME="/dev/null") == str(own / "kernels" / _jit.key())
    assert own.stat().st_mode & 0o777 == 0o700
    own.chmod(0o777)
    assert folder_of(monkeypatch, HOME="/dev/null") is None
    shutil.rmtree(own)
    (tmp_path / "elsewhere").mkdir()
    own.symlink_to(tmp_path / "elsewhere")
    assert folder_of(monkeypatch, HOME="/dev/null") is None


def test_a_change_of_any_source_is_another_place(tmp_path: Path) -> None:
    shutil.copytree(SOURCES.parent, tmp_path / "kernels")
    folder = tmp_path / "kernels" / "cpu"
    before = _jit.key.__wrapped__(folder)
    assert before == _jit.key()
    for path in (folder / "_tile.py", folder.parent / "layout.py"):
        path.write_text(path.read_text() + "\n")
        assert _jit.key.__wrapped__(folder) != before
        before = _jit.key.__wrapped__(folder)
