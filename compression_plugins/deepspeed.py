"""Importing this installs the DeepSpeed adapter, where torch's plug-in mechanism is switched off."""

from __future__ import annotations

from typing import Any

from .adapters.deepspeed.engine import install

__all__ = ["finish", "install"]


def finish(engine: Any) -> None:
    """Training is over: with `every` > 1, exchange what the last, partial round has learned, so that every rank holds
    the same weights. Call it on all ranks. Harmless otherwise.

    Args:
        engine: what `deepspeed.initialize` returned.
    """
    session = getattr(engine, "communication_compression", None)
    if session is not None:
        session.common.finish(engine.optimizer)
