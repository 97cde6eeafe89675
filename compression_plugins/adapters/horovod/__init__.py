"""Horovod: `horovodrun --compression` and `hvd.DistributedOptimizer(compression=...)`; names are imported late."""

from __future__ import annotations

from typing import Any

_NAMES = ("Compression", "SchemeCompressor", "install", "load_state_dict", "state_dict")
__all__ = [*_NAMES]  # noqa: PLE0604


def __getattr__(name: str) -> Any:
    if name not in _NAMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from . import optimizer

    return getattr(optimizer, name)
