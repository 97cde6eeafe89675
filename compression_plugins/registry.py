"""Name -> scheme. A file in `schemes/` that decorates its class with `@register` is all it takes.

Neither this module nor a scheme module imports torch at its top: a launcher validates a configuration on a
machine, and in a moment, where importing torch would be the slowest thing it does.
"""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache
from typing import TYPE_CHECKING, TypeVar

from .errors import ConfigError, nearest

if TYPE_CHECKING:
    from .schemes.base import Scheme

_SCHEMES: dict[str, type[Scheme]] = {}
S = TypeVar("S", bound="type[Scheme]")


def register(cls: S) -> S:
    """Class decorator: make a `Scheme` selectable by its `name`."""
    other = _SCHEMES.get(cls.name)
    if other is not None and other.__module__ != cls.__module__:
        raise ConfigError(f"scheme {cls.name!r} is registered twice: in {other.__module__} and in {cls.__module__}")
    _SCHEMES[cls.name] = cls
    return cls


@cache
def _load() -> None:
    from . import schemes

    for module in pkgutil.iter_modules(schemes.__path__):
        importlib.import_module(f"{schemes.__name__}.{module.name}")


def names() -> list[str]:
    """Every registered scheme, sorted."""
    _load()
    return sorted(_SCHEMES)


def get(name: str) -> type[Scheme]:
    """The scheme class called `name`; raises `ConfigError` naming the nearest valid one."""
    _load()
    if name not in _SCHEMES:
        raise ConfigError(f"unknown scheme {name!r}{nearest(name, _SCHEMES)}")
    return _SCHEMES[name]
