"""Set up `.venv` for `make`: preflight, torch, the package with its extras, Horovod built against that torch.

Each finished stage leaves a stamp in `.venv/.setup` with a hash of what it depended on, so a second run starts only
what changed. Standard library only, and old syntax as in `preflight`, whose first check is the version of Python.
"""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from launch import preflight  # noqa: E402  (the path above is what makes it importable)

VENV = preflight.VENV
PYTHON = VENV / "bin" / "python"
STAMPS = VENV / ".setup"
LOG = VENV / "setup.log"
EXTRAS = "horovod,deepspeed,triton,clients,bench,dev"
VERSION = "{}.{}".format(*sys.version_info)
CONSTRAINTS = ROOT / "constraints.txt"


def pinned(package):
    """The requirement `package==version` that constraints.txt tests with."""
    lines = CONSTRAINTS.read_text().splitlines()
    return next(line.split(";")[0].strip() for line in lines if line.startswith(package + "=="))


def digest(*parts):
    """A hash of strings and of the content of files; the version of this script is always one of them."""
    total = hashlib.sha256(Path(__file__).read_bytes())
    for part in parts:
        total.update(part.read_bytes() if isinstance(part, Path) else part.encode())
        total.update(b"\0")
    return total.hexdigest()


def horovod_variables():
    """Horovod's build variables as one string: a change of them means another build."""
    from compression_plugins.adapters.horovod import build as install_horovod

    return repr(install_horovod.build_variables(os.environ))


def horovod_files_fit():
    """Do the files in `.venv` look like a Horovod for the torch in `.venv`? No import: this runs before every job."""
    package = next(VENV.glob("lib/python*/site-packages/horovod"), None)
    if package is None or not list(package.glob("torch/mpi_lib_v2*.so")):
        return False
    torch = (package.parent / "torch" / "version.py").read_text()
    built_for = (package / "metadata.json").read_text().partition('"pytorch": "')[2].partition('"')[0]
    return f"__version__ = '{built_for}'" in torch


def stages():
    """(name, hash of its inputs, is its result in place?, function) of each stage, in order."""
    torch = digest(VERSION, pinned("torch"))
    package = digest(torch, ROOT / "pyproject.toml", CONSTRAINTS, ROOT / "compression_plugins_autoload.pth")
    horovod = digest(torch, ROOT / "compression_plugins" / "install_horovod.py", horovod_variables())
    return [
        ("venv", digest(VERSION), PYTHON.exists(), make_venv),
        ("torch", torch, True, install_torch),
        ("package", package, True, install_package),
        ("horovod", horovod, horovod_files_fit(), install_horovod),
    ]


def pip(label, *arguments):
    """One pip command in `.venv`, reported as one line."""
    from compression_plugins.adapters.horovod.build_env import run_logged

    run_logged(label, [str(PYTHON), "-m", "pip", "--disable-pip-version-check", "install", *arguments], LOG)


def install_torch():
    """torch before anything that may ask for it by a range: its exact version decides what Horovod is built for."""
    pip(f"Installing {pinned('torch')}", pinned("torch"))


def install_package():
    """This package, editable, with every extra."""
    pip(f"Installing the package with [{EXTRAS}]", "-c", str(CONSTRAINTS), "-e", f"{ROOT}[{EXTRAS}]")


def install_horovod():
    """Horovod, by the module that users run themselves."""
    status = subprocess.call([str(PYTHON), "-m", "compression_plugins.install_horovod"], cwd=str(ROOT))
    if status != 0:
        sys.exit(status)


def make_venv():
    """`.venv` of this Python; one that stands already is kept and completed."""
    from compression_plugins.adapters.horovod.build_env import SetupError, run_logged

    configuration = VENV / "pyvenv.cfg"
    if configuration.exists():
        settings = dict(line.split(" = ", 1) for line in configuration.read_text().splitlines() if " = " in line)
        if settings.get("version", VERSION).split(".")[:2] != VERSION.split("."):
            raise SetupError(
                f"{VENV} was made by Python {settings['version']}, and this is {VERSION}: run `make clean` first, "
                "or `make PYTHON=...` with the former."
            )
    run_logged("Creating .venv", [sys.executable, "-m", "venv", str(VENV)], LOG)


def is_pending(stage):
    """Has this stage still to run, or to run again?"""
    name, key, in_place, _ = stage
    stamp = STAMPS / name
    return not (in_place and stamp.exists() and stamp.read_text() == key)


def main():
    old = preflight.check_python()
    preflight.report([old] if old else [])
    from compression_plugins.adapters.horovod.build_env import SetupError

    try:
        todo = [stage for stage in stages() if is_pending(stage)]
        if not todo:
            return
        print(f"Setting up {VENV}", flush=True)
        preflight.report(preflight.check_machine())
        STAMPS.mkdir(parents=True, exist_ok=True)
        for name, key, _, run in todo:
            if name == "torch" or (name == "package" and todo[0][0] == "package"):
                preflight.report(list(filter(None, [preflight.check_index(PYTHON)])))
            run()
            (STAMPS / name).write_text(key)
    except SetupError as error:
        sys.exit(f"setup: {error}")


if __name__ == "__main__":
    main()
