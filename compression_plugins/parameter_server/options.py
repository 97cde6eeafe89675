"""Options of a parameter-server run: from YAML, JSON, a dict or keyword arguments, the same on server and workers."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ..config import read_document
from ..errors import ConfigError, nearest, shown
from .algorithms import get

Positive = Annotated[float, Field(gt=0)]
Weight = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(gt=0, le=1)]
Count = Annotated[int, Field(ge=1)]

#: Only the server reads these; they may differ between the two sides and change at a resume.
_SERVER_ONLY = {"epochs", "target_loss", "patience_s", "start_s", "restarts", "returns"}


class Options(BaseModel):
    """Everything that decides the iterates, and how long the server waits. Build one with `Options.load`.

    Minimises P(x) = (1/n) sum_i f_i(x) + l1 |x|_1 + (l2/2) |x|^2; the two penalties are the server's, by their proximal
    operator, not part of the loss that workers compute.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    method: str = Field("asylpg", description="algorithm: asylpg, sparse_asylpg, acc_asylpg, asyfpg, acc_asyfpg, qsvrg")
    workers: Annotated[int, Field(ge=1, le=4096)] = Field(4, description="worker processes, and parts of the data (M)")
    lr: Annotated[float, Field(gt=0, le=1e33)] = Field(0.1, description="step size (eta)")
    epochs: Count = Field(10, description="snapshots taken, each followed by inner_steps updates")
    inner_steps: Count | None = Field(
        None, description="updates between snapshots (m); default: one pass over the data"
    )
    batch_size: Count = Field(32, description="samples of a worker's two gradients, drawn with replacement")
    snapshot_batch: Count = Field(512, description="samples a worker passes through the model at once at a snapshot")
    tau: Annotated[int, Field(ge=0)] = Field(8, description="bound of the delay t - D(t), in updates")
    bits: Annotated[int, Field(ge=2, le=16)] = Field(8, description="bits of a gradient value (b)")
    mu: Positive = Field(0.5, description="error of the weights sent, relative to their distance to the snapshot")
    budget: Share = Field(1.0, description="sparse_asylpg: share of the largest legal number of survivors (phi)")
    theta: Annotated[float, Field(ge=1e-3, le=1)] = Field(0.9, description="acc_*: first weight of the momentum form")
    l1: Weight = Field(0.0, description="weight of |x|_1")
    l2: Weight = Field(0.0, description="weight of |x|^2 / 2")
    seed: Annotated[int, Field(ge=0, lt=2**32)] = Field(0, description="seed of every random choice")
    target_loss: float | None = Field(None, description="stop at the first snapshot whose P(x) is at or below this")
    patience_s: Positive = Field(10.0, description="seconds that others wait for a worker before it is dropped")
    start_s: Positive = Field(120.0, description="seconds to wait for all workers at the start, or for one if all died")
    restarts: Annotated[int, Field(ge=0)] = Field(3, description="times that a worker of this machine is started again")
    returns: Annotated[int, Field(ge=0)] = Field(
        20, description="times that a worker may connect again in the whole run"
    )

    @classmethod
    def load(
        cls,
        source: str | os.PathLike[str] | Mapping[str, Any] | None = None,
        overrides: Mapping[str, Any] | None = None,
    ) -> Options:
        """Read options from a YAML or JSON file or a mapping; `overrides` replace its keys.

        Raises:
            ConfigError: one sentence: what is wrong, where, and the nearest valid choice.
        """
        document, where = _read(source)
        document.update(overrides or {})
        for key in document:
            if key not in cls.model_fields:
                raise ConfigError(f"{where}: unknown key {shown(key)}{nearest(str(key), cls.model_fields)}")
        try:
            options = cls(**document)
        except ValidationError as error:
            detail = error.errors()[0]
            key = ".".join(str(part) for part in detail["loc"][:1])
            message = f"{detail['msg'][0].lower()}{detail['msg'][1:]}"
            raise ConfigError(f"{where}: {key} = {shown(detail['input'])}: {message}") from None
        try:
            get(options.method)
        except ConfigError as error:
            raise ConfigError(f"{where}: {error}") from None
        return options

    def steps_an_epoch(self, samples: int) -> int:
        """Inner steps between two snapshots (m in the paper): `inner_steps`, or else as many as make one pass over
        `samples`, at least 1.
        """
        return self.inner_steps or max(1, -(-samples // self.batch_size))

    def digest(self, numel: int, samples: int) -> bytes:
        """SHA-256 (32 bytes) that two processes share exactly when options, model size and data size agree."""
        shared = {key: value for key, value in self.model_dump().items() if key not in _SERVER_ONLY}
        return hashlib.sha256(json.dumps([shared, numel, samples], sort_keys=True).encode()).digest()


def _read(source: str | os.PathLike[str] | Mapping[str, Any] | None) -> tuple[dict[str, Any], str]:
    if source is None or isinstance(source, Mapping):
        return dict(source or {}), "parameter-server options"
    return read_document(source), str(source)
