"""Is this machine ready for `make demo` and `make test`? Run by make before anything is downloaded or built.

Prints one sentence with its remedy for each missing thing and exits with 2. Standard library only. This file must
parse on any Python 3, or an old one would answer with a traceback: hence no `from __future__` line and old syntax.
"""

import importlib.util
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
PYTHON_MINIMUM = (3, 10)
# .venv with a CPU build of torch takes 2.8 GB; the libraries of a CUDA build, and temporary files, are allowances.
VENV_GB, CUDA_GB, TEMPORARY_GB = 3.5, 7.0, 1.5


def check_python():
    """The sentence about a Python that is too old, or None."""
    if sys.version_info >= PYTHON_MINIMUM:
        return None
    found = ".".join(map(str, sys.version_info[:2]))
    return f"{sys.executable} is Python {found}, but 3.10 or newer is needed: run `make PYTHON=/path/to/python3 ...`."


def check_venv():
    """The sentence about a Python that cannot make a virtual environment, or None."""
    for name in ("venv", "ensurepip"):
        if importlib.util.find_spec(name) is None:
            return f"This Python lacks the module {name}: install it (Debian/Ubuntu: apt-get install python3-venv)."
    return None


def check_machine():
    """Every missing thing that can be seen without the network, as a list of sentences."""
    problem = check_python()
    if problem:
        return [problem]
    if str(ROOT) not in sys.path:
        sys.path.insert(0, str(ROOT))
    from compression_plugins.adapters.horovod import build_env

    env = build_env.with_own_scripts(os.environ)
    need_gb = VENV_GB + (CUDA_GB if os.path.exists("/proc/driver/nvidia/version") else 0.0)
    checks = [
        check_venv(),
        build_env.check_compiler(env),
        build_env.check_cmake(env),
        build_env.check_python_headers(),
        build_env.check_disk(VENV, need_gb, "the virtual environment"),
        build_env.check_disk(Path(tempfile.gettempdir()), TEMPORARY_GB, "building Horovod"),
    ]
    return [problem for problem in checks if problem]


def check_index(python):
    """The sentence about a package index that `python`'s pip cannot reach, or None. Takes one tiny download.

    pip itself is the judge: proxies, mirrors, certificates and offline wheel folders are all in its configuration.
    """
    remedy = "check the network, and the index and proxy that `pip config list` shows."
    with tempfile.TemporaryDirectory() as folder:
        command = [str(python), "-m", "pip", "download", "--quiet", "--no-deps", "--no-cache-dir", "--timeout", "10"]
        command += ["--retries", "1", "--disable-pip-version-check", "--dest", folder, "iniconfig"]
        try:
            done = subprocess.run(command, capture_output=True, timeout=60)
        except subprocess.TimeoutExpired:
            return f"pip had no answer from its package index in 60 s: {remedy}"
    if done.returncode == 0:
        return None
    errors = [line for line in done.stderr.decode(errors="replace").splitlines() if line.startswith("ERROR: ")]
    reason = errors[0][len("ERROR: ") :].rstrip(".") if errors else f"exit status {done.returncode}"
    return f"pip cannot download packages ({reason}): {remedy}"


def report(problems):
    """Print the sentences and exit with 2, or return when there are none."""
    for problem in problems:
        print(f"preflight: {problem}", file=sys.stderr)
    if problems:
        sys.exit(2)


if __name__ == "__main__":
    report(check_machine())
