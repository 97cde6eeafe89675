"""Patterns of a configuration that match no tensor: a typo, or meant for another model of the same job."""

from __future__ import annotations

from collections.abc import Sequence

from ..config import Config
from ..errors import ConfigError
from .notice import warn
from .plan import unmatched

#: Digest of a configuration -> its patterns that no model has matched so far, and what to say of them.
_idle: dict[str, dict[str, str]] = {}


def note(config: Config, names: Sequence[str], speaks: bool) -> None:
    """A model with tensors of these names uses `config`; warn of patterns that match none of them.

    Args:
        names: of all its parameters, those that are frozen included.
        speaks: whether this rank is the one that warns.
    """
    found = dict(unmatched(config, names))
    if speaks:
        for message in found.values():
            warn(message)
    digest = config.digest()
    _idle[digest] = {word: text for word, text in found.items() if word in _idle.get(digest, found)}


def check(config: Config) -> None:
    """Training begins.

    Raises:
        ConfigError: a pattern matches nothing in any model of this process.
    """
    for message in _idle.get(config.digest(), {}).values():
        raise ConfigError(f"{message}. Correct it or remove it")
