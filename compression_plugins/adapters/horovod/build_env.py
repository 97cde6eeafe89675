"""What a native build needs from the machine, and how a long command reports itself. Standard library only, because
`make` runs it before anything is installed. Every missing thing is one sentence that ends with its remedy.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

CMAKE_MINIMUM = (3, 21)  # the first that reads the environment variable CMAKE_TOOLCHAIN_FILE
_NOTE_EVERY_S = 30.0  # without a terminal, a line this often says that a long stage is alive

_CXX17_PROBE = """
#include <optional>
#if defined(__GNUC__) && !defined(__clang__) && __GNUC__ < 9
#error GCC 9 or later
#endif
static_assert(__cplusplus >= 201703L, "C++17");
int main() { return std::optional<int>(0).value(); }
"""


class SetupError(RuntimeError):
    """The set-up cannot go on: one sentence that says what is missing or failed, and the remedy."""


def with_own_scripts(env: Mapping[str, str]) -> dict[str, str]:
    """A copy of `env` whose PATH finds this interpreter's scripts (cmake or ninja from pip) without activation."""
    scripts = sysconfig.get_path("scripts")
    return {**env, "PATH": os.pathsep.join([scripts, env["PATH"]] if env.get("PATH") else [scripts])}


def check_compiler(env: Mapping[str, str]) -> str | None:
    """The sentence about a missing or too old C++ compiler (`CXX`, else CMake's own choice), or None."""
    wanted = env.get("CXX", "").split()
    names = wanted[:1] or ["c++", "g++", "clang++"]
    found = next((path for name in names if (path := shutil.which(name, path=env.get("PATH")))), None)
    if found is None:
        what = f"CXX={env['CXX']} is not a program" if wanted else "No C++ compiler was found (c++, g++, clang++)"
        return f"{what}: install one (Debian/Ubuntu: apt-get install g++; Fedora: dnf install gcc-c++) or set CXX."
    command = [found, *wanted[1:], "-std=c++17", "-fsyntax-only", "-x", "c++", "-"]
    probe = subprocess.run(command, input=_CXX17_PROBE, text=True, capture_output=True)
    if probe.returncode == 0:
        return None
    reason = next((line for line in probe.stderr.splitlines() if "error" in line), f"exit status {probe.returncode}")
    return f"{found} cannot compile C++17 ({reason.strip()}): install GCC 9, Clang 9 or newer and name it in CXX."


def check_cmake(env: Mapping[str, str]) -> str | None:
    """The sentence about a missing or too old cmake (`HOROVOD_CMAKE`, else `cmake`), or None."""
    minimum = ".".join(map(str, CMAKE_MINIMUM))
    remedy = "apt-get install cmake, dnf install cmake, or `pip install cmake`"
    name = env.get("HOROVOD_CMAKE", "cmake")
    found = shutil.which(name, path=env.get("PATH"))
    if found is None:
        return f"{name} was not found: install CMake {minimum} or newer ({remedy})."
    output = subprocess.run([found, "--version"], text=True, capture_output=True).stdout
    version = re.search(r"version\s+(\d+)\.(\d+)", output)
    if version is None:
        return f"{found} --version does not answer as CMake does: install CMake {minimum} or newer ({remedy})."
    if (int(version[1]), int(version[2])) < CMAKE_MINIMUM:
        return f"{found} is CMake {version[1]}.{version[2]}, but {minimum} or newer is needed: {remedy}."
    return None


def check_make(env: Mapping[str, str]) -> str | None:
    """The sentence about a missing `make`, the build tool that CMake drives by default, or None."""
    if "CMAKE_GENERATOR" in env or shutil.which("make", path=env.get("PATH")):
        return None
    return (
        "make was not found, which CMake drives: apt-get install make, or set CMAKE_GENERATOR=Ninja and install ninja."
    )


def check_python_headers() -> str | None:
    """The sentence about missing C headers of this interpreter, or None."""
    include = Path(sysconfig.get_path("include"))
    if (include / "Python.h").is_file():
        return None
    package = f"python{sys.version_info[0]}.{sys.version_info[1]}-dev"
    return f"Python.h is missing from {include}: install the headers of this Python (apt-get install {package})."


def check_disk(folder: Path, need_gb: float, purpose: str) -> str | None:
    """The sentence about too little free space for `purpose` on the file system of `folder`, or None."""
    while not folder.exists():
        folder = folder.parent
    free_gb = shutil.disk_usage(folder).free / 1e9
    if free_gb >= need_gb:
        return None
    hint = " or point TMPDIR elsewhere" if folder == Path(tempfile.gettempdir()) else ""
    return f"{folder} has {free_gb:.1f} GB free, but {purpose} needs {need_gb:.1f} GB: free some space{hint}."


class Stage:
    """Progress of one long command: a line that is redrawn on a terminal, else a line now and then below the label."""

    def __init__(self, label: str) -> None:
        self.label, self._start, self._printed = label, time.monotonic(), time.monotonic()
        self._terminal = sys.stdout.isatty()
        print(f"  {label} ...", end="" if self._terminal else "\n", flush=True)

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._start

    def tick(self, note: str = "") -> None:
        """Show that the command is alive. `note` may hold its progress."""
        text = f"{note} {self.seconds:.0f} s".lstrip()
        if self._terminal:
            print(f"\r\033[K  {self.label} ... {text}", end="", flush=True)
        elif time.monotonic() - self._printed >= _NOTE_EVERY_S:
            self._printed = time.monotonic()
            print(f"    {text}", flush=True)

    def end(self, note: str) -> None:
        """Print how it ended, and after how many seconds."""
        head = f"\r\033[K  {self.label} ... " if self._terminal else "    "
        print(f"{head}{note} ({self.seconds:.0f} s)", flush=True)


def run_logged(
    label: str,
    command: Sequence[str],
    log: Path,
    env: Mapping[str, str] | None = None,
    progress: Callable[[str], str] = lambda tail: "",
) -> None:
    """Run `command`, its output in `log` (appended) and one `Stage` line on the screen.

    Args:
        progress: turns the last few kB of this command's output into the note of the progress line.

    Raises:
        SetupError: the command failed; the message is `remedy` of its output and names the log.
    """
    stage = Stage(label)
    with log.open("ab") as sink:
        begin = sink.tell()
        sink.write(f"$ {' '.join(map(str, command))}\n".encode())
        sink.flush()
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=sink, stderr=subprocess.STDOUT, env=env)
        try:
            while True:
                try:
                    status = process.wait(timeout=0.5)
                    break
                except subprocess.TimeoutExpired:
                    stage.tick(progress(_tail(log, begin)))
        except BaseException:
            process.terminate()
            process.wait()
            raise
    if status != 0:
        stage.end("FAILED")
        raise SetupError(f"{label} failed: {remedy(_tail(log, begin, 1 << 22))} The whole log: {log}")
    stage.end("done")


def _tail(log: Path, begin: int, size: int = 4096) -> str:
    """The last `size` bytes of `log`, not before the offset `begin`."""
    with log.open("rb") as source:
        source.seek(max(begin, os.fstat(source.fileno()).st_size - size))
        return source.read().decode(errors="replace")


#: (pattern in the output, its most likely cause and remedy). First match wins: causes before their consequences.
_REMEDIES = (
    (
        r"No space left on device|Disk quota exceeded",
        "the disk is full; free some space, or point TMPDIR to a larger disk.",
    ),
    (
        r"Killed signal terminated program|internal compiler error: Killed|virtual memory exhausted",
        "the compiler ran out of memory; run `python -m compression_plugins.install_horovod --jobs 1`.",
    ),
    (
        r"C\+\+\d\d or later compatible compiler",
        "torch's headers need a newer C++ standard than was set; use CMake 3.21 or newer, unset CMAKE_TOOLCHAIN_FILE.",
    ),
    (
        r"Compatibility with CMake < 3\.\d+ has been removed",
        "this CMake dropped a policy that Horovod's Gloo asks for; unset CMAKE_POLICY_VERSION_MINIMUM, or use CMake 3.",
    ),
    (
        r"Could NOT find MPI",
        "no MPI with headers; install one (apt-get install libopenmpi-dev openmpi-bin), or unset HOROVOD_WITH_MPI.",
    ),
    (
        r"Could NOT find NCCL",
        "NCCL's headers were not found; install libnccl-dev or set HOROVOD_NCCL_HOME.",
    ),
    (
        r"this PyTorch installation does not support CUDA",
        "GPU operations need a CUDA build of torch; install one, or unset HOROVOD_GPU_OPERATIONS.",
    ),
    (
        r"Could NOT find CUDAToolkit|CUDA_HOME environment variable is not set|Cannot find `nvcc`",
        "the CUDA toolkit was not found; install the version torch was built with and set HOROVOD_CUDA_HOME.",
    ),
    (
        r"Python\.h: No such file",
        "the headers of this Python are missing (apt-get install python3-dev).",
    ),
    (
        r"No module named '?(pip|ensurepip)|ensurepip is not",
        "this Python has no pip; install it (apt-get install python3-venv).",
    ),
    (
        r"name resolution|new connection|Network is unreachable|Connection(Error|Reset)|Timeout(Error)?\b|Max retries|"
        r"Could not fetch URL|ProxyError",
        "the package index was not reached; check the network, and the index and proxy that `pip config list` shows.",
    ),
    (
        r"ResolutionImpossible|conflicting dependencies",
        "the versions in constraints.txt exclude each other here; the log names the two.",
    ),
    (
        r"No matching distribution found",
        "a pinned version has no release for this Python or platform; use Python 3.10 to 3.13 on Linux.",
    ),
)


def remedy(output: str) -> str:
    """The most likely cause of a failed command and what to do about it; its last error line where none is known."""
    for pattern, text in _REMEDIES:
        if re.search(pattern, output):
            return text
    errors = [line.strip() for line in output.splitlines() if re.search(r"\berror\b", line, re.IGNORECASE)]
    return f"its last error was: {errors[-1][:300]}." if errors else "it printed no error."
