"""Lines that a person running a job should see, once, from one rank."""

from __future__ import annotations

import logging
import sys

_logger = logging.getLogger("compression_plugins")


def announce(message: str, level: int = logging.INFO) -> None:
    """Log `message`; print it to stderr where the logger would drop it, as in scripts that never set logging up, or
    that call `logging.basicConfig()`, whose level is WARNING.
    """
    if _reaches_a_handler(level):
        _logger.log(level, message)
    else:
        print(f"compression_plugins: {message}", file=sys.stderr, flush=True)


def warn(message: str) -> None:
    """The same for what is probably a mistake."""
    announce(f"warning: {message}", logging.WARNING)


def _reaches_a_handler(level: int) -> bool:
    if not _logger.isEnabledFor(level):
        return False
    logger: logging.Logger | None = _logger
    while logger is not None:
        if any(handler.level <= level for handler in logger.handlers):
            return True
        logger = logger.parent if logger.propagate else None
    return False
