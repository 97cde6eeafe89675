"""Elastic training: `hvd.elastic.TorchState(model=..., optimizer=...)` also keeps the compression memory.

What a rank has not sent yet is its own, so it is saved and restored with every commit but never broadcast, as Horovod
would do with an unknown object. When the set of ranks changes it starts again at zero on all of them (`Session.open`).
"""

from __future__ import annotations

from typing import Any

import torch
from horovod.torch.elastic import state as host


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
            self.value._compression_session.load_state_dict(self._saved_memory)

    def _memory(self) -> dict[str, Any] | None:
        session = getattr(self.value, "_compression_session", None)
        return None if session is None else session.state_dict()
