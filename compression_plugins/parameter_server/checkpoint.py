"""The server's checkpoint: one file, written whole or not at all, and refused whole if a bit of it has changed.

A plain dict of numbers and tensors that `torch.load(..., weights_only=True)` reads, and a SHA-256 over all of it. The
checksum finds damage, not forgery: who can write the file can write its checksum. So every field has bounds as well.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from ..engine.saved import checksum
from ..errors import CompressionError

VERSION = 2
_Count = Annotated[int, Field(ge=0, lt=2**62)]
_STRICT = ConfigDict(strict=True, extra="forbid", frozen=True)


class _Traffic(BaseModel):
    model_config = _STRICT
    snapshot_bits: _Count
    down_bits: _Count
    up_bits: _Count
    wire_bytes: _Count


class _Row(BaseModel):
    model_config = ConfigDict(**_STRICT, allow_inf_nan=False)
    epoch: _Count
    step: _Count
    loss: float
    gradient_norm: Annotated[float, Field(ge=0)]
    bits: _Count
    wire_bytes: _Count
    model_bits: Annotated[float, Field(ge=0, le=32)]
    survivors: Annotated[float, Field(ge=0, le=1)] | None
    delay: _Count


class Contents(BaseModel):
    """What a checkpoint holds, tensors aside; the fields of `Server.state_dict`."""

    model_config = _STRICT
    version: Literal[2]
    digest: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
    step: _Count
    epoch: _Count
    tickets: _Count
    theta: Annotated[float, Field(gt=0, le=1)]
    traffic: _Traffic
    history: list[_Row]


def check(saved: Mapping[str, Any], numel: int) -> Contents:
    """The contents of a state, after its checksum and its bounds.

    Args:
        saved: sealed as by `engine.saved.seal`, or what a file has made of it.
        numel: of the model.

    Raises:
        CompressionError: what is wrong, in one sentence.
    """
    version = saved.get("version") if isinstance(saved, Mapping) else None
    if version != VERSION:
        raise CompressionError(
            f"a checkpoint of version {version!r:.40}; this package reads {VERSION}: begin without it"
        )
    own = {key: value for key, value in saved.items() if key != "checksum"}
    try:
        whole = saved.get("checksum") == checksum(own)
    except (TypeError, ValueError, RuntimeError):  # values of types that no checkpoint holds
        whole = False
    if not whole:
        raise CompressionError("the checkpoint is damaged: its checksum does not fit its contents")
    tensors = {name: own.pop(name, None) for name in ("x", "momentum")}
    for name, x in tensors.items():
        if not isinstance(x, Tensor) or x.dtype != torch.float32 or x.shape != (numel,) or not x.isfinite().all():
            raise CompressionError(f"the checkpoint's {name} is not {numel:,} finite fp32 values")
    try:
        contents = Contents(**own)
    except ValidationError as error:
        detail = error.errors()[0]
        where = ".".join(map(str, detail["loc"]))
        raise CompressionError(f"the checkpoint's {where} is not one of a run: {detail['msg']}") from None
    rows = contents.history
    if not (contents.epoch <= len(rows) <= contents.epoch + 1) or [row.epoch for row in rows] != list(range(len(rows))):
        raise CompressionError(f"the checkpoint's history has {len(rows)} rows for {contents.epoch} epochs")
    if contents.tickets < contents.step or any(row.step > contents.step for row in rows):
        raise CompressionError(f"the checkpoint's counts contradict each other at update {contents.step}")
    return contents


def load(path: Path) -> dict[str, Any]:
    """What the file holds, which `check` has yet to see; nothing but numbers and tensors is read.

    Raises:
        CompressionError: it cannot be read.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file makes torch raise nearly anything
        reason = (str(error).splitlines() or [""])[0][:200]
        raise CompressionError(f"cannot read the checkpoint {path}: {reason or type(error).__name__}") from None
