"""Build Horovod against the torch of this interpreter: `python -m compression_plugins.install_horovod`.

Horovod's last release (0.28.1) compiles itself as C++14, which the headers of torch >= 2.1 refuse, and under pip's
build isolation it does not see torch at all: `pip install horovod` ends with success and without torch support. Here
the released source is built unpatched. A CMake toolchain file, given from outside, turns its C++14 into C++17, and the
result counts only once `horovod.torch` imports with the controllers and GPU operations that were asked for.

Horovod's own build variables are honoured (`HOROVOD_GPU_OPERATIONS=NCCL`, `HOROVOD_WITH_MPI=1`, `HOROVOD_CUDA_HOME`);
without any, Gloo is built and MPI is not. A good wheel is kept in `$COMPRESSION_PLUGINS_CACHE/wheels` (default
`~/.cache/compression_plugins/wheels`), one for each Horovod, torch, Python, platform and set of build variables.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import runpy
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from . import build_env
from .build_env import SetupError

HOROVOD_VERSION = "0.28.1"
BUILD_GB = 1.5
_GB_PER_JOB = 2.0  # the peak of one compiler process on torch's headers
_SELF = "python -m compression_plugins.install_horovod"

#: What Horovod's setup.py and `horovodrun` import; setuptools also stands in for distutils, gone from Python 3.12.
REQUIREMENTS = ("setuptools", "wheel", "packaging", "cffi", "cloudpickle", "psutil", "pyyaml")

#: Read by CMake twice: as the toolchain file, and again right after Horovod's `project()`, when the compiler's own
#: settings are loaded and "standard 14" can be made to mean C++17. Horovod's `set(CMAKE_CXX_STANDARD 14)` shadows
#: the direct ways.
_TOOLCHAIN = """\
set(CMAKE_PROJECT_INCLUDE "${CMAKE_CURRENT_LIST_FILE}")
if(CMAKE_PROJECT_NAME)
  set(CMAKE_CXX14_STANDARD_COMPILE_OPTION "-std=c++17")
  set(CMAKE_CXX14_EXTENSION_COMPILE_OPTION "-std=gnu++17")
endif()
"""

#: Environment variables that change what is built (and so belong to the key of the cache), in Horovod's CMake files.
_BUILD_VARIABLE = re.compile(
    r"HOROVOD_(WITH|WITHOUT|NCCL|BUILD)_\w+|HOROVOD_GPU(_\w+)?|HOROVOD_(CUDA|ROCM)_HOME|HOROVOD_NVTX_INCLUDE|HOROVOD_DEBUG"
    r"|HOROVOD_CPU_OPERATIONS|HOROVOD_ALLOW_MIXED_GPU_IMPL|HOROVOD_LOCAL_VERSION|CUDA_HOME|CCL_ROOT|CXX|CXXFLAGS|LDFLAGS"
)

_PROBE = """
import importlib.util, json, os
facts = {}
spec = importlib.util.find_spec("horovod")
if spec is not None:
    import horovod
    facts["version"] = getattr(horovod, "__version__", "unknown")
    try:
        with open(os.path.join(os.path.dirname(horovod.__file__), "metadata.json")) as source:
            facts["built_for"] = json.load(source).get("pytorch")
    except (OSError, ValueError):
        facts["built_for"] = None
    try:
        import torch
        facts["torch"] = str(torch.__version__)
        import horovod.torch as hvd
        facts["extension"] = hasattr(hvd, "init")
        if facts["extension"]:
            facts.update(gloo=bool(hvd.gloo_built()), mpi=bool(hvd.mpi_built()), nccl=bool(hvd.nccl_built()))
    except BaseException as error:
        facts["error"] = f"{type(error).__name__}: {error}"
print("\\n" + json.dumps(facts))
"""


@dataclass(frozen=True)
class Features:
    """Gloo, MPI, NCCL: built in (True), left out (False), or no wish (None)."""

    gloo: bool | None
    mpi: bool | None
    nccl: bool | None

    def __str__(self) -> str:
        return ", ".join(f"{name} {'yes' if built else 'no'}" for name, built in vars(self).items())


def asked(env: Mapping[str, str]) -> Features:
    """What Horovod's build variables in `env` ask for; Gloo unless it is switched off."""

    def wish(name: str) -> bool | None:
        if env.get(f"HOROVOD_WITHOUT_{name}") == "1":
            return False
        return True if env.get(f"HOROVOD_WITH_{name}") == "1" else None

    nccl = any(key.startswith("HOROVOD_GPU_") and value == "NCCL" for key, value in env.items())
    return Features(gloo=wish("GLOO") is not False, mpi=wish("MPI"), nccl=True if nccl else None)


def inspect(wanted: Features, python: str = sys.executable) -> tuple[str | None, str]:
    """What is wrong with the Horovod of `python` (None: nothing), and a line that describes it."""
    env = {key: value for key, value in os.environ.items() if key != "COMPRESSION_PLUGINS_CONFIG"}
    run = subprocess.run([python, "-c", _PROBE], text=True, capture_output=True, env=env, cwd=tempfile.gettempdir())
    if run.returncode != 0:
        return f"it crashes the interpreter (status {run.returncode})", "unusable"
    facts = json.loads(run.stdout.rsplit("\n", 2)[-2])
    if "version" not in facts:
        return "it is not installed", "absent"
    line = f"Horovod {facts['version']}" + (f" for torch {facts['built_for']}" if facts["built_for"] else "")
    if "error" in facts:
        return f"horovod.torch does not import ({facts['error'].splitlines()[0]})", line
    if not facts["extension"]:
        return "it has no torch support, which is what plain `pip install horovod` leaves", line
    if facts["built_for"] != facts["torch"]:
        return f"it was built for torch {facts['built_for']}, but torch {facts['torch']} is installed", line
    got = Features(facts["gloo"], facts["mpi"], facts["nccl"])
    for name, wish in vars(wanted).items():
        if wish is not None and getattr(got, name) is not wish:
            return f"it was built {'without' if wish else 'with'} {name}", f"{line} ({got})"
    return None, f"{line} ({got})"


def build_variables(env: Mapping[str, str]) -> dict[str, str]:
    """The part of `env` that changes what is built, plus what we add to it; sorted, so that it can be hashed."""
    chosen = {key: value for key, value in env.items() if _BUILD_VARIABLE.fullmatch(key)}
    chosen["HOROVOD_WITH_PYTORCH"] = "1"
    for name, default in (("TENSORFLOW", "WITHOUT"), ("MXNET", "WITHOUT"), ("MPI", "WITHOUT"), ("GLOO", "WITH")):
        if not {f"HOROVOD_WITH_{name}", f"HOROVOD_WITHOUT_{name}"} & chosen.keys():
            chosen[f"HOROVOD_{default}_{name}"] = "1"
    if chosen.get("HOROVOD_WITHOUT_PYTORCH") == "1":
        raise SetupError("HOROVOD_WITHOUT_PYTORCH=1 contradicts this installer, which builds for torch: unset it.")
    return dict(sorted(chosen.items()))


def torch_version() -> dict[str, str | None]:
    """Version and accelerator of the installed torch, read from its version file: importing it takes seconds."""
    spec = importlib.util.find_spec("torch")
    if spec is None or not spec.submodule_search_locations:
        raise SetupError(
            f"torch is not installed in {sys.prefix}: `pip install torch` first, Horovod is compiled against it."
        )
    facts = runpy.run_path(str(Path(spec.submodule_search_locations[0]) / "version.py"))
    return {"torch": str(facts["__version__"]), "cuda": facts.get("cuda"), "hip": facts.get("hip")}


def cache_key(env: Mapping[str, str]) -> str:
    """Name of the wheel's folder in the cache: readable, and different wherever the binary could be."""
    torch = torch_version()
    tag = f"{sys.implementation.cache_tag}{getattr(sys, 'abiflags', '')}"
    facts = {
        **torch,
        "horovod": HOROVOD_VERSION,
        "python": tag,
        "platform": [sysconfig.get_platform(), *platform.libc_ver()],
        "variables": build_variables(env),
        "mpi": _first_line("mpirun", env) if env.get("HOROVOD_WITH_MPI") == "1" else None,
        "nvcc": shutil.which("nvcc", path=env.get("PATH")) if torch["cuda"] else None,
    }
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]
    return f"horovod-{HOROVOD_VERSION}-torch-{torch['torch']}-{tag}-{digest}"


def _first_line(program: str, env: Mapping[str, str]) -> str | None:
    path = shutil.which(program, path=env.get("PATH"))
    if path is None:
        return None
    return subprocess.run([path, "--version"], text=True, capture_output=True).stdout.partition("\n")[0]


def cache_folder(env: Mapping[str, str]) -> Path | None:
    """The cache; None where it cannot be written, or where `COMPRESSION_PLUGINS_CACHE` is set to nothing."""
    root = env.get("COMPRESSION_PLUGINS_CACHE")
    if root == "":
        return None
    home = Path(root) if root else Path(env.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "compression_plugins"
    try:
        home.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=home):
            return home
    except OSError as error:
        print(f"  The wheel will not be kept: {home} is not writable ({error.strerror}).")
        return None


def build_environment(env: Mapping[str, str], folder: Path, jobs: int) -> dict[str, str]:
    """The environment of Horovod's build. `folder` receives the toolchain file."""
    toolchain = folder / "horovod_cxx17.cmake"
    own = env.get("CMAKE_TOOLCHAIN_FILE")
    toolchain.write_text((f'include("{own}")\n' if own else "") + _TOOLCHAIN)
    result = build_env.with_own_scripts({**env, **build_variables(env)})
    for inherited in ("MAKEFLAGS", "MFLAGS", "MAKELEVEL"):  # a parent make's job server is closed to pip's children
        result.pop(inherited, None)
    result["MAKEFLAGS"] = f"-j{jobs}"
    result["CMAKE_TOOLCHAIN_FILE"] = str(toolchain)
    result.setdefault("CMAKE_POLICY_VERSION_MINIMUM", "3.5")  # CMake >= 4 refuses the 2.8.12 of Horovod's Gloo
    result["CXXFLAGS"] = f"{env.get('CXXFLAGS', '')} -include cstdint".strip()  # GCC >= 13: Horovod misses the header
    return result


def default_jobs() -> int:
    """As many compilers as there are cores for this process, and 2 GB of memory for each."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    memory_gb = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    return max(1, min(cores, int(memory_gb / _GB_PER_JOB)))


def _progress(tail: str) -> str:
    percent = re.findall(r"\[\s*(\d+)%\]", tail)
    return f"{percent[-1]} %" if percent else ""


def _pip(label: str, arguments: list[str], log: Path, env: Mapping[str, str] | None = None) -> None:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments]
    build_env.run_logged(label, command, log, env, _progress)


def _install_requirements(log: Path) -> None:
    missing = []
    for name in REQUIREMENTS:
        try:
            importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            missing.append(name)
    if missing:
        _pip(f"Installing {', '.join(missing)} for Horovod", ["install", *missing], log)


def _check_machine(env: Mapping[str, str]) -> None:
    env = build_env.with_own_scripts(env)
    checks = [
        build_env.check_compiler(env),
        build_env.check_cmake(env),
        build_env.check_make(env),
        build_env.check_python_headers(),
        build_env.check_disk(Path(tempfile.gettempdir()), BUILD_GB, "building Horovod"),
    ]
    problems = [problem for problem in checks if problem]
    if problems:
        raise SetupError("Horovod cannot be built here. " + " ".join(problems))


def build(env: Mapping[str, str], folder: Path, log: Path, jobs: int) -> Path:
    """Build the released source in `folder`; returns the wheel. Horovod is not installed by this.

    Raises:
        SetupError: a tool is missing, or the build failed.
    """
    _check_machine(env)
    _install_requirements(log)
    what = f"Building Horovod {HOROVOD_VERSION} for torch {torch_version()['torch']} with {jobs} jobs"
    arguments = ["wheel", f"horovod=={HOROVOD_VERSION}", "--no-binary", "horovod", "--no-deps", "--no-cache-dir"]
    arguments += ["--no-build-isolation", "--use-pep517", "--verbose", "--wheel-dir", str(folder)]
    _pip(what, arguments, log, build_environment(env, folder, jobs))
    return next(folder.glob("horovod-*.whl"))


def _install(wheel: Path, log: Path, wanted: Features) -> str:
    """Install `wheel` and prove it; returns the line that describes it."""
    _pip("Installing Horovod", ["install", "--no-deps", "--no-index", "--force-reinstall", str(wheel)], log)
    problem, line = inspect(wanted)
    if problem:
        raise SetupError(f"Horovod was built, but {problem}. The whole log: {log}")
    return line


def install(env: Mapping[str, str], force: bool = False, jobs: int | None = None) -> str:
    """Make `import horovod.torch` work in this interpreter with what `env` asks for; returns a line that describes it.

    A good install is left alone, a kept wheel is preferred to a build. `force` does neither.

    Raises:
        SetupError: with the reason and the remedy.
    """
    wanted = asked(env)
    key = cache_key(env)
    if not force:
        problem, line = inspect(wanted)
        if problem is None:
            return f"{line} is in place"
        if line != "absent":
            print(f"  Replacing {line}: {problem}.")
    cache = cache_folder(env)
    log = (cache or Path(tempfile.mkdtemp(prefix="compression_plugins-"))) / "logs" / f"{key}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    log.unlink(missing_ok=True)
    kept = sorted((cache / "wheels" / key).glob("*.whl")) if cache else []
    if kept and not force:
        try:
            _install_requirements(log)
            return f"{_install(kept[0], log, wanted)}, from {kept[0].parent}"
        except SetupError as error:
            print(f"  The kept wheel is no good, building anew: {error}")
            kept[0].unlink()
    with tempfile.TemporaryDirectory(prefix="horovod-build-") as folder:
        wheel = build(env, Path(folder), log, jobs or default_jobs())
        line = _install(wheel, log, wanted)
        if cache:
            _keep(wheel, cache / "wheels" / key)
    return line


def _keep(wheel: Path, folder: Path) -> None:
    """Put a proven wheel into the cache in one step, so that no other process can see half of it."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as partial:
        shutil.copy2(wheel, partial)
        os.replace(Path(partial) / wheel.name, folder / wheel.name)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog=_SELF, description="Build Horovod against the installed torch.")
    parser.add_argument("--check", action="store_true", help="only say whether the installed Horovod is good")
    parser.add_argument(
        "--force", action="store_true", help="build from source even if a good one is installed or kept"
    )
    parser.add_argument("--jobs", type=int, metavar="N", help="parallel compilers (default: cores, at 2 GB each)")
    options = parser.parse_args(argv)
    try:
        if options.check:
            problem, line = inspect(asked(os.environ))
            print(f"{line}: {problem}. Remedy: {_SELF}" if problem else line)
            return 1 if problem else 0
        if options.jobs is not None and options.jobs < 1:
            raise SetupError(f"--jobs must be 1 or more, not {options.jobs}.")
        print(f"  {install(os.environ, options.force, options.jobs)}.")
    except SetupError as error:
        print(f"install_horovod: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
