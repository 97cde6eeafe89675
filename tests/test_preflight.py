"""The preflight: each missing thing is one sentence with its remedy and exit status 2, before any download."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest

from compression_plugins.adapters.horovod import build_env
from launch import bootstrap, preflight

ROOT = Path(__file__).resolve().parent.parent


def program(folder: Path, name: str, script: str) -> Path:
    """A shell script that pretends to be the tool `name`."""
    path = folder / name
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path


def run(env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """The preflight as make runs it, on an interpreter without any installed package."""
    command = [sys.executable, "-S", "-E", str(ROOT / "launch" / "preflight.py")]
    return subprocess.run(command, env=env, text=True, capture_output=True, cwd="/")


def test_a_ready_machine_passes_in_silence():
    done = run({"PATH": os.environ["PATH"]})
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_every_missing_tool_is_one_sentence_with_a_remedy(tmp_path):
    done = run({"PATH": str(tmp_path), "CXX": "no-such-compiler", "HOROVOD_CMAKE": "no-such-cmake"})
    lines = done.stderr.splitlines()
    assert done.returncode == 2 and len(lines) == 2
    assert all(line.startswith("preflight: ") for line in lines)
    assert "CXX=no-such-compiler" in lines[0] and "apt-get install g++" in lines[0]
    assert "no-such-cmake was not found" in lines[1] and "apt-get install cmake" in lines[1]


@pytest.mark.parametrize(("version", "good"), [("3.20.5", False), ("3.21.0", True), ("4.1.2", True), ("2.8.12", False)])
def test_cmake_must_be_able_to_read_a_toolchain_file_from_the_environment(tmp_path, version, good):
    program(tmp_path, "cmake", f"echo cmake version {version}")
    problem = build_env.check_cmake({"PATH": str(tmp_path)})
    assert (problem is None) is good
    assert good or f"is CMake {version.rpartition('.')[0]}, but 3.21 or newer is needed" in problem


def test_a_compiler_that_cannot_compile_cxx17_is_refused_with_its_own_words(tmp_path):
    program(tmp_path, "g++", "echo \"error: unrecognized option '-std=c++17'\" >&2; exit 1")
    problem = build_env.check_compiler({"PATH": str(tmp_path)})
    assert "unrecognized option '-std=c++17'" in problem and "CXX" in problem


def test_the_real_compiler_passes():
    assert build_env.check_compiler(os.environ) is None


def test_a_compiler_launcher_in_cxx_is_understood(tmp_path):
    program(tmp_path, "launcher", 'exec "$@"')
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    assert build_env.check_compiler({"PATH": path, "CXX": "launcher c++"}) is None


def test_too_little_disk_is_told_in_numbers(monkeypatch, tmp_path):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage(10**12, 0, 1_200_000_000))
    problem = build_env.check_disk(tmp_path / "not" / "yet", 3.5, "the virtual environment")
    assert problem.startswith(f"{tmp_path} has 1.2 GB free, but the virtual environment needs 3.5 GB")


def test_missing_python_headers_are_told(monkeypatch, tmp_path):
    monkeypatch.setattr(build_env.sysconfig, "get_path", lambda name: str(tmp_path))
    assert "-dev" in build_env.check_python_headers()


def test_an_old_python_is_told_first_and_alone(monkeypatch):
    monkeypatch.setattr(sys, "version_info", (3, 9, 18, "final", 0))
    (problem,) = preflight.check_machine()
    assert "is Python 3.9, but 3.10 or newer is needed" in problem and "make PYTHON=" in problem


@pytest.mark.parametrize("name", ["preflight", "bootstrap"])
def test_an_old_python_can_read_the_scripts_that_would_tell_it(name):
    source = (ROOT / "launch" / f"{name}.py").read_text()
    ast.parse(source, feature_version=(3, 6))
    assert not re.search(r"^from __future__ import annotations", source, re.MULTILINE)  # a SyntaxError before 3.7


def test_a_python_without_venv_is_told(monkeypatch):
    monkeypatch.setattr(preflight.importlib.util, "find_spec", lambda name: None)
    assert "python3-venv" in preflight.check_venv()


def test_an_index_that_cannot_be_reached_is_told_quickly(monkeypatch):
    """pip is real; nothing listens on the discard port of this machine."""
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    problem = preflight.check_index(sys.executable)
    assert problem.startswith("pip cannot download packages (") and "pip config list" in problem


# --- bootstrap ------------------------------------------------------------------------------------------------------


@pytest.fixture
def venv(monkeypatch, tmp_path):
    """An empty place for `.venv`, stages that only note that they ran, and no stamp."""
    ran: list[str] = []
    place = tmp_path / ".venv"
    (place / "bin").mkdir(parents=True)
    (place / "bin" / "python").touch()
    for name, value in {"VENV": place, "PYTHON": place / "bin" / "python", "STAMPS": place / ".setup"}.items():
        monkeypatch.setattr(bootstrap, name, value)
    for stage in ("make_venv", "install_torch", "install_package", "install_horovod"):
        monkeypatch.setattr(bootstrap, stage, lambda stage=stage: ran.append(stage))
    monkeypatch.setattr(bootstrap, "horovod_files_fit", lambda: True)
    monkeypatch.setattr(preflight, "check_machine", list)
    monkeypatch.setattr(preflight, "check_index", lambda python: None)
    return ran


def rerun(ran: list[str]) -> list[str]:
    ran.clear()
    bootstrap.main()
    return list(ran)


def test_the_first_run_does_every_stage_and_the_second_none(venv):
    assert rerun(venv) == ["make_venv", "install_torch", "install_package", "install_horovod"]
    assert rerun(venv) == []


def test_a_stage_runs_again_when_what_it_depends_on_changed(venv, monkeypatch, tmp_path):
    rerun(venv)
    changed = tmp_path / "constraints.txt"
    changed.write_text(bootstrap.CONSTRAINTS.read_text() + "\nattrs==1.0\n")
    monkeypatch.setattr(bootstrap, "CONSTRAINTS", changed)
    assert rerun(venv) == ["install_package"]
    changed.write_text(re.sub(r"(?m)^torch==.*$", "torch==2.12.1", changed.read_text()))
    assert rerun(venv) == ["install_torch", "install_package", "install_horovod"]
    monkeypatch.setenv("HOROVOD_WITH_MPI", "1")
    assert rerun(venv) == ["install_horovod"]


def test_a_horovod_that_somebody_replaced_is_installed_again(venv, monkeypatch):
    rerun(venv)
    monkeypatch.setattr(bootstrap, "horovod_files_fit", lambda: False)
    assert rerun(venv) == ["install_horovod"]


def test_a_failed_stage_keeps_what_was_done_and_is_tried_again(venv, monkeypatch, capsys):
    def fail():
        raise build_env.SetupError("Installing failed: the disk is full.")

    monkeypatch.setattr(bootstrap, "install_package", fail)
    with pytest.raises(SystemExit, match="setup: Installing failed: the disk is full"):
        rerun(venv)
    monkeypatch.setattr(bootstrap, "install_package", lambda: venv.append("install_package"))
    assert rerun(venv) == ["install_package", "install_horovod"]


def test_a_problem_of_the_machine_stops_before_the_first_stage(venv, monkeypatch, capsys):
    monkeypatch.setattr(preflight, "check_machine", lambda: ["No C++ compiler was found."])
    with pytest.raises(SystemExit) as caught:
        rerun(venv)
    assert caught.value.code == 2 and venv == []
    assert capsys.readouterr().err == "preflight: No C++ compiler was found.\n"


@pytest.mark.parametrize(
    ("built_for", "library", "fits"), [("2.13.0+cpu", 1, True), ("2.12.1", 1, False), ("", 0, False)]
)
def test_horovod_files_are_judged_by_library_and_torch_version(monkeypatch, tmp_path, built_for, library, fits):
    site = tmp_path / "lib" / "python3.11" / "site-packages"
    (site / "torch").mkdir(parents=True)
    (site / "torch" / "version.py").write_text("__version__ = '2.13.0+cpu'\ndebug = False\n")
    (site / "horovod" / "torch").mkdir(parents=True)
    (site / "horovod" / "metadata.json").write_text(f'{{\n"pytorch": "{built_for}",\n"dummy": "none"\n}}')
    if library:
        (site / "horovod" / "torch" / "mpi_lib_v2.cpython-311-x86_64-linux-gnu.so").touch()
    monkeypatch.setattr(bootstrap, "VENV", tmp_path)
    assert bootstrap.horovod_files_fit() is fits


def test_a_venv_of_another_python_is_never_overwritten(monkeypatch, tmp_path):
    (tmp_path / "pyvenv.cfg").write_text("home = /usr/bin\nversion = 3.8.10\n")
    monkeypatch.setattr(bootstrap, "VENV", tmp_path)
    with pytest.raises(build_env.SetupError, match=r"was made by Python 3\.8\.10.*make clean"):
        bootstrap.make_venv()
