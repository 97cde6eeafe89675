"""Torch DDP: `compression-plugins torchrun --compression`, or `compression_plugins.ddp.compress`; names come late."""

from __future__ import annotations

from typing import Any

_PLACES = {"Compression": ".hook", "attach": ".hook", "find": ".hook", "install": ".notice"}
__all__ = [*_PLACES]  # noqa: PLE0604


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_PLACES[name], __name__), name)
