"""Every refusal of this package is one of these: one sentence with what, where and the remedy."""

from __future__ import annotations

import difflib
import reprlib
from collections.abc import Iterable

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxlong = _SHORT.maxother = 76


class CompressionError(ValueError):
    """Base of all errors raised on purpose by this package."""


class ConfigError(CompressionError):
    """A configuration that cannot be accepted: unknown word, wrong type or range, unreadable file."""


class UnsupportedError(CompressionError):
    """A combination of scheme, host, dtype or device that cannot work; refused at start-up."""


class MismatchError(CompressionError):
    """A rank that differs from the others in configuration, tensors or versions."""


def shown(value: object, width: int = 80) -> str:
    """`repr(value)` in one line of at most `width` characters, for a message; quick, whatever `value` holds."""
    try:
        text = _SHORT.repr(value)
    except ValueError:  # of an integer with thousands of digits
        text = f"an {type(value).__name__} of very many digits"
    return text if len(text) <= width else f"{text[: width - 1]}…"


def nearest(word: str, valid: Iterable[str]) -> str:
    """`'; did you mean 'x'?'` for a typo, else the list of valid words; ready to append to a message."""
    words = sorted(valid)
    close = difflib.get_close_matches(str(word)[:200], words, n=1, cutoff=0.6)
    return f"; did you mean {close[0]!r}?" if close else f"; valid: {', '.join(words)}"
