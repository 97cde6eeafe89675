"""Elastic training: `hvd.elastic.TorchState(model=..., optimizer=...)` also keeps the compression memory.

What a rank has not sent yet is its own, so it is saved and restored with every commit but never broadcast, as Horovod
would do with an unknown object. When the set of ranks changes, each begins with the mean of the old ones' (`memory`).
"""

from __future__ import annotations

from typing import Any

import torch
from horovod.torch.elastic import state as host

from .memory import Memory


def install() -> None:
    """Let Horovod's registry handle optimizers with this module's handler, which extends its own. Idempotent."""
    registry = host.get_handler_registry()
    for i, (kind, handler) in enumerate(registry):
        if kind is torch.optim.Optimizer and handler is host.OptimizerStateHandler:
            registry[i] = (kind, CompressedOptimizerHandler)


class CompressedOptimizerHandler(host.OptimizerStateHandler):
    """Horovod's handler of an optimizer, and the compression memory of a compressed one."""

    def __init__(self, optimizer: Any) -> None:
        super().__init__(optimizer)
        self._saved_memory = self._memory()

    def save(self) -> None:
        super().save()
        self._saved_memory = self._memory()

    def restore(self) -> None:
        super().restore()
        if self._saved_memory is not None:
            self.value._compression_session.revert(self._saved_memory)

    def set_value(self, value: Any) -> None:
        """An optimizer that is built anew, as after a reset, takes over what the one before it remembers."""
        earlier, later = (getattr(one, "_compression_session", None) for one in (self.value, value))
        if earlier is not None and later is not None and earlier is not later and not later.started:
            later.revert(earlier.commit())
        super().set_value(value)

    def _memory(self) -> Memory | None:
        session = getattr(self.value, "_compression_session", None)
        return None if session is None else session.commit()
