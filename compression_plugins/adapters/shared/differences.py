"""What the start-up comparisons of ranks have in common, whatever carries them."""

from __future__ import annotations

from typing import Any

#: Environment variable: seconds to wait for the slowest rank.
TIMEOUT_VARIABLE = "COMPRESSION_PLUGINS_HANDSHAKE_TIMEOUT"


def differences(mine: dict[str, Any], theirs: dict[str, Any], prefix: str = "") -> list[str]:
    """`["config.ratio (100 on rank 0, 10 there)", ...]`, empty when equal."""
    found = []
    for name in sorted({*mine, *theirs}):
        a, b = mine.get(name), theirs.get(name)
        if isinstance(a, dict) and isinstance(b, dict):
            found += differences(a, b, f"{prefix}{name}.")
        elif a != b:
            found.append(f"{prefix}{name} ({a!r} on rank 0, {b!r} there)")
    return found
