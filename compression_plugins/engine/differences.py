"""What comparisons of ranks, and of a saved configuration with the present one, have in common."""

from __future__ import annotations

from typing import Any

from ..errors import shown

#: Environment variable: seconds to wait for the slowest rank.
TIMEOUT_VARIABLE = "COMPRESSION_PLUGINS_HANDSHAKE_TIMEOUT"


def differences(
    mine: dict[str, Any], theirs: dict[str, Any], prefix: str = "", here: str = "on rank 0", there: str = "there"
) -> list[str]:
    """`["config.ratio (100 on rank 0, 10 there)", ...]`, empty when equal."""
    found = []
    for name in sorted({*mine, *theirs}):
        a, b = mine.get(name), theirs.get(name)
        if isinstance(a, dict) and isinstance(b, dict):
            found += differences(a, b, f"{prefix}{name}.", here, there)
        elif a != b:
            found.append(f"{prefix}{name} ({_text(a)} {here}, {_text(b)} {there})")
    return found


def _text(value: Any) -> str:
    return repr(value) if isinstance(value, str) and len(value) <= 400 else shown(value)
