"""Lines that a person running a job should see, once, from one rank."""

from __future__ import annotations

import logging
import sys

_logger = logging.getLogger("compression_plugins")


def announce(message: str) -> None:
    """Log `message` at INFO; print it to stderr where nobody has set logging up, as in most training scripts."""
    if _logger.hasHandlers():
        _logger.info(message)
    else:
        print(f"compression_plugins: {message}", file=sys.stderr, flush=True)
