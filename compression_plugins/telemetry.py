"""Counters of every step, as JSON lines or for TensorBoard.

COMPRESSION_PLUGINS_TELEMETRY=run.jsonl            one line a step (rank 0; `{rank}` in the path: every rank)
COMPRESSION_PLUGINS_TELEMETRY=tensorboard:runs/a   scalars under compression/
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import UnsupportedError

if TYPE_CHECKING:
    from .reducer import Reducer

ENVIRONMENT_VARIABLE = "COMPRESSION_PLUGINS_TELEMETRY"
#: Of `Seconds`, recorded as NAME_s.
PHASES = ("encode", "decode", "wire", "exposed")
#: Steps from one norm of the residuals to the next: it reads all of the memory, which no step should pay for.
NORM_EVERY = 10


class Telemetry:
    """Writes, for each step: payload bytes sent, ratio to a dense fp32 ring, bytes of state, seconds by phase; for
    every tenth the norm of the residuals too.
    """

    def __init__(self, target: str) -> None:
        kind, _, directory = target.partition(":")
        self._board: Any = None
        if kind == "tensorboard":
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                raise UnsupportedError(
                    f"{ENVIRONMENT_VARIABLE}={target} needs tensorboard: pip install tensorboard"
                ) from None
            self._board = SummaryWriter(directory)
        else:
            Path(target).parent.mkdir(parents=True, exist_ok=True)
            self._file = open(target, "a", encoding="utf-8", buffering=1)  # noqa: SIM115
        self._sent, self._seconds, self._lines = 0.0, dict.fromkeys(PHASES, 0.0), 0

    @classmethod
    def from_environment(cls, rank: int) -> Telemetry | None:
        """What the environment asks for; by default nothing, and only on rank 0 unless the path has `{rank}`."""
        target = os.environ.get(ENVIRONMENT_VARIABLE, "")
        if not target or (rank and "{rank}" not in target):
            return None
        return cls(target.replace("{rank}", str(rank)))

    def step(self, reducer: Reducer, elements: int, skipped: bool) -> None:
        """Record the step that has just ended."""
        size = reducer.transport.size
        sent, self._sent = reducer.transport.sent - self._sent, reducer.transport.sent
        seconds = {name: getattr(reducer.seconds, name) for name in PHASES}
        spent = {f"{name}_s": round(seconds[name] - self._seconds[name], 6) for name in PHASES}
        self._seconds = seconds
        dense = 8 * elements * (size - 1) / size
        values = {
            "step": reducer.step,
            "sent_bytes": round(sent),
            "ratio": round(dense / sent, 3) if sent else None,
            "residual_norm": reducer.state.norm() if self._lines % NORM_EVERY == 0 else None,
            "state_bytes": reducer.state.nbytes(),
            **spent,
            "skipped": skipped,
        }
        self._lines += 1
        if self._board is None:
            self._file.write(json.dumps(values) + "\n")
            return
        for name in ("sent_bytes", "ratio", "residual_norm", "state_bytes", *spent):
            if values[name] is not None:
                self._board.add_scalar(f"compression/{name}", values[name], reducer.step)
