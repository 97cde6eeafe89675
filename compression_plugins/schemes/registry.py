"""Name -> scheme. A file in this folder that decorates its class with `@register` is all it takes.

Neither this module nor a scheme module imports torch at its top: a launcher validates a configuration on a
machine, and in a moment, where importing torch would be the slowest thing it does.
"""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache
from typing import Any, TypeVar

from ..errors import ConfigError, nearest, shown

_SCHEMES: dict[str, Any] = {}
S = TypeVar("S", bound=type)


def register(cls: S) -> S:
    """Class decorator: make a `Scheme` selectable by its `name`."""
    name = cls.name  # type: ignore[attr-defined]
    other = _SCHEMES.get(name)
    if other is not None and other.__module__ != cls.__module__:
        raise ConfigError(f"scheme {name!r} is registered twice: in {other.__module__} and in {cls.__module__}")
    _SCHEMES[name] = cls
    return cls


@cache
def _load() -> None:
    package = importlib.import_module(__package__)
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"{__package__}.{module.name}")


def names() -> list[str]:
    """Every registered scheme, sorted."""
    _load()
    return sorted(_SCHEMES)


def get(name: str) -> Any:
    """The scheme class called `name` (a subclass of `schemes.base.Scheme`).

    Raises:
        ConfigError: there is none; the message has the nearest valid name.
    """
    _load()
    if name not in _SCHEMES:
        raise ConfigError(f"unknown scheme {shown(name)}{nearest(name, _SCHEMES)}")
    return _SCHEMES[name]
