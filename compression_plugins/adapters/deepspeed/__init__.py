"""DeepSpeed: the block `communication_compression` of its config; names are imported at first use."""

from __future__ import annotations

from typing import Any

_NAMES = ("attach", "install", "parse")
__all__ = [*_NAMES]  # noqa: PLE0604


def __getattr__(name: str) -> Any:
    if name not in _NAMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from . import engine

    return getattr(engine, name)
