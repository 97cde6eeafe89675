"""The Horovod installer: what it recognises, what it builds with, when it builds, and what it keeps."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from compression_plugins.adapters.horovod import build as ih
from compression_plugins.adapters.horovod import build_env
from compression_plugins.adapters.horovod.build_env import SetupError

GLOO = ih.Features(gloo=True, mpi=None, nccl=None)


@pytest.fixture
def torch(monkeypatch):
    """A torch version that the test can change."""
    facts = {"torch": "2.13.0+cpu", "cuda": None, "hip": None}
    monkeypatch.setattr(ih, "torch_version", lambda: dict(facts))
    return facts


# --- the key of the cache -------------------------------------------------------------------------------------------


def test_cache_key_changes_with_everything_that_changes_the_binary(monkeypatch, torch):
    keys = [ih.cache_key({})]
    for variables in (
        {"HOROVOD_GPU_OPERATIONS": "NCCL"},
        {"HOROVOD_WITH_MPI": "1"},
        {"HOROVOD_NCCL_HOME": "/opt/nccl"},
    ):
        keys.append(ih.cache_key(variables))
    keys.append(ih.cache_key({"CXX": "clang++"}))
    torch["torch"] = "2.12.1+cpu"
    keys.append(ih.cache_key({}))
    torch.update(torch="2.13.0+cpu", cuda="13.0")
    keys.append(ih.cache_key({}))
    torch["cuda"] = None
    monkeypatch.setattr(ih.sys.implementation, "cache_tag", "cpython-399")
    keys.append(ih.cache_key({}))
    monkeypatch.undo()
    monkeypatch.setattr(ih, "torch_version", lambda: dict(torch))
    monkeypatch.setattr(ih.sysconfig, "get_platform", lambda: "linux-aarch64")
    keys.append(ih.cache_key({}))
    assert len(set(keys)) == len(keys)


def test_cache_key_ignores_what_only_a_running_job_reads(torch):
    run_time = {
        "HOROVOD_RANK": "3",
        "HOROVOD_CYCLE_TIME": "1",
        "HOROVOD_TIMELINE": "x",
        "HOME": "/root",
        "MAKEFLAGS": "-j9",
    }
    assert ih.cache_key(run_time) == ih.cache_key({})


# --- what the build sees --------------------------------------------------------------------------------------------


def test_build_variables_default_to_gloo_without_mpi():
    chosen = ih.build_variables({"HOROVOD_RANK": "0"})
    assert chosen["HOROVOD_WITH_PYTORCH"] == chosen["HOROVOD_WITH_GLOO"] == chosen["HOROVOD_WITHOUT_MPI"] == "1"
    assert "HOROVOD_RANK" not in chosen


def test_build_variables_of_the_user_win():
    own = {"HOROVOD_WITH_MPI": "1", "HOROVOD_WITHOUT_GLOO": "1", "HOROVOD_WITH_TENSORFLOW": "1"}
    chosen = ih.build_variables(own)
    assert own.items() <= chosen.items()
    assert not {"HOROVOD_WITHOUT_MPI", "HOROVOD_WITH_GLOO", "HOROVOD_WITHOUT_TENSORFLOW"} & chosen.keys()


def test_a_build_without_torch_is_refused():
    with pytest.raises(SetupError, match="HOROVOD_WITHOUT_PYTORCH"):
        ih.build_variables({"HOROVOD_WITHOUT_PYTORCH": "1"})


def test_build_environment_keeps_user_flags_and_drops_the_job_server_of_a_parent_make(tmp_path):
    env = {"CXXFLAGS": "-march=native", "MAKEFLAGS": " -j --jobserver-auth=3,4", "MAKELEVEL": "1", "PATH": "/bin"}
    result = ih.build_environment(env, tmp_path, jobs=3)
    assert result["CXXFLAGS"] == "-march=native -include cstdint"
    assert result["MAKEFLAGS"] == "-j3" and "MAKELEVEL" not in result
    assert result["CMAKE_POLICY_VERSION_MINIMUM"] == "3.5"


@pytest.mark.parametrize("own_toolchain", [False, True])
def test_toolchain_file_makes_a_cxx14_project_compile_as_cxx17(tmp_path, own_toolchain):
    """A real CMake project that insists on C++14 the way Horovod does, with source that only C++17 accepts."""
    (tmp_path / "CMakeLists.txt").write_text(
        "cmake_minimum_required(VERSION 3.13)\nproject(probe CXX)\nset(CMAKE_CXX_STANDARD 14)\n"
        "set(CMAKE_CXX_STANDARD_REQUIRED ON)\nset(CMAKE_CXX_EXTENSIONS OFF)\nadd_library(probe OBJECT probe.cc)\n"
        'if(OWN)\n  target_compile_definitions(probe PRIVATE "OWN=1")\nendif()\n'
    )
    want = "#ifndef OWN\n#error the user's toolchain file was lost\n#endif\n" if own_toolchain else ""
    # std::uint8_t without its header is what GCC >= 13 rejects in Horovod.
    (tmp_path / "probe.cc").write_text(
        f'{want}static_assert(__cplusplus == 201703L, "C++17");\nstd::uint8_t byte = 0;\n'
    )
    env = {"PATH": "/usr/local/bin:/usr/bin:/bin"}
    if own_toolchain:
        (tmp_path / "own.cmake").write_text("set(OWN TRUE)\n")
        env["CMAKE_TOOLCHAIN_FILE"] = str(tmp_path / "own.cmake")
    env = ih.build_environment(env, tmp_path, jobs=1)
    for command in (["cmake", "-S", ".", "-B", "build"], ["cmake", "--build", "build", "--verbose"]):
        done = subprocess.run(command, cwd=tmp_path, env=env, text=True, capture_output=True)
        assert done.returncode == 0, done.stdout + done.stderr
    assert "-std=c++17" in done.stdout and "-std=c++14" not in done.stdout


# --- recognising an install -----------------------------------------------------------------------------------------


@pytest.fixture
def site(tmp_path, monkeypatch):
    """`site(...)` lays a Horovod as some installer would leave it, beside a torch 2.13.0, and puts both on the path."""

    def lay(torch_module: str = "", built_for: str | None = "2.13.0", horovod: bool = True) -> None:
        (tmp_path / "torch").mkdir()
        (tmp_path / "torch" / "__init__.py").write_text("__version__ = '2.13.0'\n")
        if horovod:
            (tmp_path / "horovod" / "torch").mkdir(parents=True)
            (tmp_path / "horovod" / "__init__.py").write_text("__version__ = '0.28.1'\n")
            (tmp_path / "horovod" / "torch" / "__init__.py").write_text(torch_module)
            facts = {"dummy": "none", **({"pytorch": built_for} if built_for else {})}
            (tmp_path / "horovod" / "metadata.json").write_text(json.dumps(facts))
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    return lay


GOOD = "init = print\ngloo_built = lambda: True\nmpi_built = lambda: False\nnccl_built = lambda: 0\n"


def test_a_good_install_is_recognised(site):
    site(GOOD)
    problem, line = ih.inspect(GLOO)
    assert problem is None
    assert line == "Horovod 0.28.1 for torch 2.13.0 (gloo yes, mpi no, nccl no)"


def test_the_install_that_plain_pip_leaves_is_recognised(site):
    site("print('Extension horovod.torch has not been built')\n", built_for=None)
    problem, _ = ih.inspect(GLOO)
    assert "no torch support" in problem and "pip install horovod" in problem


def test_an_install_for_another_torch_is_recognised(site):
    site(GOOD, built_for="2.12.1")
    assert ih.inspect(GLOO)[0] == "it was built for torch 2.12.1, but torch 2.13.0 is installed"


def test_an_import_error_is_reported_by_its_first_line(site):
    site("raise ImportError('undefined symbol: _ZN3c10\\nmore')\n")
    assert ih.inspect(GLOO)[0] == "horovod.torch does not import (ImportError: undefined symbol: _ZN3c10)"


def test_a_crash_of_the_interpreter_is_reported(site):
    site("import os\nos._exit(139)\n")
    assert ih.inspect(GLOO)[0] == "it crashes the interpreter (status 139)"


@pytest.mark.parametrize(
    ("env", "problem"),
    [
        ({}, None),
        ({"HOROVOD_WITH_MPI": "1"}, "it was built without mpi"),
        ({"HOROVOD_WITHOUT_MPI": "1"}, None),
        ({"HOROVOD_WITHOUT_GLOO": "1"}, "it was built with gloo"),
        ({"HOROVOD_GPU_OPERATIONS": "NCCL"}, "it was built without nccl"),
        ({"HOROVOD_GPU_ALLREDUCE": "NCCL"}, "it was built without nccl"),
        ({"HOROVOD_GPU_OPERATIONS": "MPI"}, None),
    ],
)
def test_what_was_built_is_held_against_what_was_asked(site, env, problem):
    site(GOOD)
    assert ih.inspect(ih.asked(env))[0] == problem


# --- the order of work ----------------------------------------------------------------------------------------------


class Machine:
    """A machine whose pip and Horovod are pretended; it counts the builds and knows which wheel is installed."""

    def __init__(self, monkeypatch, tmp_path: Path) -> None:
        self.installed, self.builds, self.wheel_content, self.env = "absent", 0, "good", {}
        self.env["COMPRESSION_PLUGINS_CACHE"] = str(tmp_path / "cache")
        monkeypatch.setattr(ih, "torch_version", lambda: {"torch": "2.13.0", "cuda": None, "hip": None})
        monkeypatch.setattr(ih, "_check_machine", lambda env: None)
        monkeypatch.setattr(ih, "_install_requirements", lambda log: None)
        monkeypatch.setattr(ih, "inspect", self.inspect)
        monkeypatch.setattr(ih, "_pip", self.pip)

    def inspect(self, wanted):
        problems = {"absent": "it is not installed", "good": None}
        return problems.get(self.installed, f"it is {self.installed}"), self.installed

    def pip(self, label, arguments, log, env=None):
        if arguments[0] == "install":
            self.installed = Path(arguments[-1]).read_text()
            return
        assert "--no-build-isolation" in arguments and "--no-cache-dir" in arguments
        assert Path(env["CMAKE_TOOLCHAIN_FILE"]).is_file()
        self.builds += 1
        folder = Path(arguments[arguments.index("--wheel-dir") + 1])
        (folder / "horovod-0.28.1-cp311-cp311-linux_x86_64.whl").write_text(self.wheel_content)

    def wheels(self):
        return sorted(Path(self.env["COMPRESSION_PLUGINS_CACHE"]).glob("wheels/*/*"))


@pytest.fixture
def machine(monkeypatch, tmp_path):
    return Machine(monkeypatch, tmp_path)


def test_a_good_install_is_left_alone(machine):
    machine.installed = "good"
    assert ih.install(machine.env).endswith("is in place")
    assert machine.builds == 0 and machine.wheels() == []


def test_a_broken_install_is_replaced_and_the_wheel_is_kept(machine, capsys):
    machine.installed = "without torch support"
    ih.install(machine.env)
    assert machine.installed == "good" and machine.builds == 1 and len(machine.wheels()) == 1
    assert "Replacing without torch support" in capsys.readouterr().out


def test_a_kept_wheel_spares_the_build(machine):
    ih.install(machine.env)
    machine.installed = "absent"
    ih.install(machine.env)
    assert machine.installed == "good" and machine.builds == 1


def test_a_kept_wheel_that_does_not_work_is_thrown_away_and_built_anew(machine, capsys):
    ih.install(machine.env)
    machine.wheels()[0].write_text("rotten")
    machine.installed = "absent"
    ih.install(machine.env)
    assert machine.installed == "good" and machine.builds == 2
    assert [wheel.read_text() for wheel in machine.wheels()] == ["good"]
    assert "building anew" in capsys.readouterr().out


def test_a_build_that_does_not_import_is_an_error_and_never_kept(machine):
    machine.wheel_content = "without torch support"
    with pytest.raises(SetupError, match="built, but it is without torch support"):
        ih.install(machine.env)
    assert machine.wheels() == []


def test_force_builds_in_spite_of_a_good_install_and_a_kept_wheel(machine):
    ih.install(machine.env)
    ih.install(machine.env, force=True)
    assert machine.builds == 2


@pytest.mark.parametrize("cache", ["", "/proc/no/such/place"])
def test_without_a_cache_the_install_works_all_the_same(machine, cache):
    machine.env["COMPRESSION_PLUGINS_CACHE"] = cache
    ih.install(machine.env)
    assert machine.installed == "good" and machine.builds == 1


# --- failing well ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("output", "remedy"),
    [
        ("g++: fatal error: Killed signal terminated program cc1plus", "--jobs 1"),
        ("c10/x.h:1: error: #error C++17 or later compatible compiler is required to use PyTorch", "C++ standard"),
        ("-- Could NOT find MPI (missing: MPI_CXX_FOUND)\nCMake Error", "libopenmpi-dev"),
        ("Could NOT find NCCL (missing: NCCL_INCLUDE_DIR)", "HOROVOD_NCCL_HOME"),
        ("as.cc: error: No space left on device", "TMPDIR"),
        ("x.h:3:10: fatal error: Python.h: No such file or directory", "python3-dev"),
        ("NewConnectionError('Failed to establish a new connection: [Errno -3]'", "index"),
        ("note: x\nfoo.cc:3: error: expected ';'\nmake: ***", "foo.cc:3: error: expected ';'"),
        ("", "printed no error"),
    ],
)
def test_a_failed_build_names_its_likely_remedy(output, remedy):
    assert remedy in build_env.remedy(output)


def test_a_failed_command_names_its_log_and_judges_only_its_own_output(tmp_path, capsys):
    log = tmp_path / "build.log"
    log.write_text("earlier: No space left on device\n")
    command = [sys.executable, "-c", "print('foo.cc:1: error: bad'); raise SystemExit(3)"]
    with pytest.raises(SetupError) as caught:
        build_env.run_logged("Building", command, log)
    assert str(log) in str(caught.value) and "foo.cc:1: error: bad" in str(caught.value)
    assert re.search(r"Building \.\.\.\s+FAILED \(\d+ s\)", capsys.readouterr().out)


def test_missing_tools_are_named_together_before_anything_is_built(monkeypatch, tmp_path, torch):
    monkeypatch.setattr(ih, "inspect", lambda wanted: ("it is not installed", "absent"))
    monkeypatch.setattr(ih, "_pip", lambda *arguments: pytest.fail("pip was run"))
    with pytest.raises(SetupError) as caught:
        ih.install({"PATH": str(tmp_path), "COMPRESSION_PLUGINS_CACHE": ""})
    for tool in ("C++ compiler", "cmake", "make"):
        assert tool in str(caught.value)


def test_without_torch_the_error_says_to_install_it(monkeypatch, capsys):
    monkeypatch.setattr(ih.importlib.util, "find_spec", lambda name: None)
    assert ih.main([]) == 2
    assert "pip install torch" in capsys.readouterr().err


def test_check_reports_and_changes_nothing(monkeypatch, capsys):
    monkeypatch.setattr(ih, "install", lambda *arguments: pytest.fail("installed"))
    monkeypatch.setattr(ih, "inspect", lambda wanted: ("it has no torch support", "Horovod 0.28.1"))
    assert ih.main(["--check"]) == 1
    assert "Remedy: python -m compression_plugins.install_horovod" in capsys.readouterr().out


def test_the_progress_line_shows_the_last_percentage_of_make():
    assert ih._progress("[  3%] Building a.o\n[ 43%] Building b.o\nnote") == "43 %"
    assert ih._progress("Preparing metadata") == ""


def test_the_installer_needs_only_the_standard_library():
    foreign = {"torch", "numpy", "pydantic", "yaml"}
    code = f"import sys, compression_plugins.install_horovod; print({foreign} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], text=True, capture_output=True, check=True)
    assert done.stdout.strip() == "set()"
