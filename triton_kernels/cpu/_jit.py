"""How the kernels are compiled, and where the compiled ones are kept.

Numba would write them beside the sources, where a read-only install has no room and an uninstall leaves them, and would
not notice that a helper in another file has changed. So they lie in the user's cache folder, under this version and
a digest of all sources that go into them: in `$NUMBA_CACHE_DIR`, else in `kernels` of `$COMPRESSION_PLUGINS_CACHE`,
else of `~/.cache/compression_plugins` (`XDG_CACHE_HOME` moves it); where that cannot be written, in a folder of the
user's own in the temporary one. Without any, and where `COMPRESSION_PLUGINS_CACHE` is set to nothing, each process
compiles them.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import stat
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from numba import config, njit

from ..._version import __version__


def sources(folder: Path) -> list[Path]:
    """What compiled kernels are made of: the files in `folder`, and constants of the one above."""
    return sorted([*folder.glob("*.py"), *folder.parent.glob("*.py")])


@functools.cache
def key(folder: Path = Path(__file__).parent) -> str:
    """Version and digest under which kernels made of the sources in `folder` are kept."""
    digest = hashlib.sha256()
    for path in sources(folder):
        digest.update(f"{path.name}\0".encode() + path.read_bytes() + b"\0")
    return f"{__version__}-{digest.hexdigest()[:16]}"


@functools.cache
def cache_folder() -> str | None:
    """Where compiled kernels are kept, or None."""
    if config.CACHE_DIR:
        return str(Path(config.CACHE_DIR) / f"compression_plugins-{key()}")
    chosen = os.environ.get("COMPRESSION_PLUGINS_CACHE")
    home = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "compression_plugins"
    if chosen == "":
        return None
    for place in (Path(chosen) if chosen else home, _own_temporary()):
        folder = place and place / "kernels" / key()
        if folder and _writable(folder):
            return str(folder)
    return None


def _own_temporary() -> Path | None:
    """A folder of this user's in the temporary one, which nobody else can write to: what lies in it is executed."""
    folder = Path(tempfile.gettempdir()) / f"compression_plugins-{os.getuid()}"
    try:
        with contextlib.suppress(FileExistsError):
            folder.mkdir(mode=0o700)
        info = folder.lstat()
    except OSError:
        return None
    return folder if stat.S_ISDIR(info.st_mode) and info.st_uid == os.getuid() and not info.st_mode & 0o077 else None


def _writable(folder: Path) -> bool:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError:
        return False
    return True


def jit(**options: Any) -> Callable[[Callable[..., Any]], Any]:
    """Compiles a kernel at its first call, or loads it.

    nogil: threads of Horovod and Gloo run beside. The numpy error model gives IEEE division, which also vectorises. No
    fast-math: an FMA or another order would change the bits that the three implementations agree on.

    Args:
        options: more of `numba.njit`.
    """

    def compile(function: Callable[..., Any]) -> Any:
        folder, before = cache_folder(), config.CACHE_DIR
        config.CACHE_DIR = folder or ""  # where the cache of a function lies is decided when it is decorated
        try:
            return njit(nogil=True, cache=folder is not None, error_model="numpy", **options)(function)
        finally:
            config.CACHE_DIR = before

    return compile
