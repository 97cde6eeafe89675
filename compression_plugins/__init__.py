"""Communication compression for Horovod and DeepSpeed.

Most jobs never import this package: `horovodrun --compression scalecom ...` or a block `communication_compression` in a
DeepSpeed config is enough. The names below are for scripts that choose a scheme themselves.
"""

from __future__ import annotations

from ._version import __version__

TYPE_CHECKING = False  # as in typing; this package is imported at every interpreter start, see adapters/autoload.py
if TYPE_CHECKING:
    from typing import Any

    from .adapters.horovod.optimizer import Compression as Compression
    from .config import Config as Config
    from .engine.reducer import Reducer as Reducer
    from .errors import CompressionError as CompressionError
    from .schemes.registry import register as register

_PLACES = {
    "Compression": ".horovod",
    "CompressionError": ".errors",
    "Config": ".config",
    "Reducer": ".engine.reducer",
    "register": ".schemes.registry",
}
__all__ = [*_PLACES, "__version__"]  # noqa: PLE0604


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_PLACES[name], __name__), name)
