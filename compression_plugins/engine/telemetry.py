"""Counters of every step, as JSON lines or for TensorBoard.

COMPRESSION_PLUGINS_TELEMETRY=run.jsonl            one line per step (rank 0; `{rank}` in the path: every rank)
COMPRESSION_PLUGINS_TELEMETRY=tensorboard:runs/a   scalars under compression/
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from .._lazy import torch
from ..core.seconds import Seconds
from ..errors import UnsupportedError

if TYPE_CHECKING:
    from torch import Tensor

ENVIRONMENT_VARIABLE = "COMPRESSION_PLUGINS_TELEMETRY"
#: Attributes of `Seconds` that are recorded, each as NAME_s.
PHASES = ("encode", "decode", "wire", "exposed")
#: Steps from one norm of the residuals to the next: it reads all of the memory, which no step should pay for.
NORM_EVERY = 10


class Counters(NamedTuple):
    """What a reducer has counted when a step ends; sums run from the start of the job.

    Attributes:
        step: optimizer steps done.
        sent: payload bytes, all steps.
        dense: bytes that the host would have sent in this step: a dense ring, in the dtype of the parameters.
        norm: gives the Euclidean norm of the residuals.
        state_bytes: bytes of state.
        seconds: by phase, all steps.
        skipped: whether the step was taken back.
        cosine: of the averages and the dense averages of this step, where `cosine_every` says so.
    """

    step: int
    sent: float
    dense: float
    norm: Callable[[], float]
    state_bytes: int
    seconds: Seconds
    skipped: bool
    cosine: float | None = None


class Cosine:
    """Of all buckets of a step, as if they were one vector."""

    def __init__(self) -> None:
        self._sums: Tensor | None = None

    def add(self, result: Tensor, dense: Tensor) -> None:
        """An average, and what it is without compression times any factor; both flat, of one length."""
        a, b = result.double(), dense.double()
        sums = (a @ b).reshape(1), (a @ a).reshape(1), (b @ b).reshape(1)
        self._sums = torch.cat(sums) if self._sums is None else self._sums + torch.cat(sums)

    def value(self) -> float | None:
        """Between -1 and 1; None where nothing was compared, or one is zero."""
        if self._sums is None:
            return None
        product, a, b = self._sums.tolist()
        return product / math.sqrt(a * b) if a * b > 0 else None


class Telemetry:
    """Writes, for each step: payload bytes sent, ratio to a dense ring, bytes of state, seconds by phase; for
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
        self._dense = 0.0  # since something was sent last

    @classmethod
    def from_environment(cls, rank: int) -> Telemetry | None:
        """What the environment asks for; by default nothing, and only on rank 0 unless the path has `{rank}`."""
        target = os.environ.get(ENVIRONMENT_VARIABLE, "")
        if not target or (rank and "{rank}" not in target):
            return None
        return cls(target.replace("{rank}", str(rank)))

    def step(self, now: Counters) -> None:
        """Record the step that has just ended."""
        sent, self._sent = now.sent - self._sent, now.sent
        self._dense += now.dense
        ratio = self._dense / sent if sent else None
        if sent:
            self._dense = 0.0
        seconds = {name: getattr(now.seconds, name) for name in PHASES}
        spent = {f"{name}_s": round(seconds[name] - self._seconds[name], 6) for name in PHASES}
        self._seconds = seconds
        values = {
            "step": now.step,
            "sent_bytes": round(sent),
            "ratio": None if ratio is None else round(ratio, 3),
            "residual_norm": now.norm() if self._lines % NORM_EVERY == 0 else None,
            "state_bytes": now.state_bytes,
            **spent,
            "cosine": None if now.cosine is None else round(now.cosine, 5),
            "skipped": now.skipped,
        }
        self._lines += 1
        if self._board is None:
            self._file.write(json.dumps(values) + "\n")
            return
        for name in ("sent_bytes", "ratio", "residual_norm", "state_bytes", "cosine", *spent):
            if values[name] is not None:
                self._board.add_scalar(f"compression/{name}", values[name], now.step)
