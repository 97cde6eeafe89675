"""Ranks compare what they are about to do, once, before the first compressed operation.

Horovod matches operations by name and length only: two ranks with different settings would decode each other's payloads
as noise. The comparison is a gather of one record of fixed size; what differs in detail travels, as JSON, only then.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
import time
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...engine.differences import TIMEOUT_VARIABLE, differences
from ...errors import MismatchError
from ...transports.base import Handle, Transport

#: Seconds to wait for the slowest rank's first step; the environment variable `TIMEOUT_VARIABLE` overrides it.
DEFAULT_TIMEOUT = 300.0
_LAYOUT = struct.Struct("<32s32sqqq")


class Standing(NamedTuple):
    """Where a rank stands: steps done, and the rank and the size of the world in which its memory was built, or -1."""

    step: int
    rank: int
    size: int


def compare(transport: Transport, facts: dict[str, Any], tensors: dict[str, Any], standing: Standing) -> list[Standing]:
    """Return every rank's `standing` when all ranks have equal `facts` and `tensors`.

    Args:
        facts: package version, configuration and whatever else must agree; JSON-able.
        tensors: name -> what must agree about it; JSON-able.

    Raises:
        MismatchError: on every rank: which ranks differ from rank 0, and in what; or that some rank did not come.
    """
    texts = [json.dumps(part, sort_keys=True).encode() for part in (facts, tensors)]
    digests = [hashlib.sha256(text).digest() for text in texts]
    record = _LAYOUT.pack(*digests, *standing)
    rows = [_LAYOUT.unpack(row) for row in _gather(transport, "facts", record)]
    if all(row[:2] == rows[0][:2] for row in rows):
        return [Standing(*row[2:]) for row in rows]
    found = []
    for what, text, column in zip(("", "tensor "), texts, (0, 1), strict=True):
        if any(row[column] != rows[0][column] for row in rows):
            found += _explain(what, [json.loads(t) for t in gather_texts(transport, text)])
    raise MismatchError(
        "horovod compression: " + "; ".join(found) + ". Give every rank the same model, configuration and package"
    )


def _explain(what: str, values: list[dict[str, Any]]) -> list[str]:
    by_difference: dict[str, list[int]] = {}
    for rank, value in enumerate(values):
        found = differences(values[0], value, what)
        if found:
            more = f" and {len(found) - 3} more" if len(found) > 3 else ""
            by_difference.setdefault(", ".join(found[:3]) + more, []).append(rank)
    return [
        f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))} {'differ' if len(ranks) > 1 else 'differs'} "
        f"from rank 0 in {difference}"
        for difference, ranks in by_difference.items()
    ]


def _gather(transport: Transport, name: str, data: bytes) -> list[bytes]:
    """Every rank's `data` (same length everywhere)."""
    rows = wait(transport.scoped(name).all_gather(torch.frombuffer(bytearray(data), dtype=torch.uint8)))
    return [bytes(row.tolist()) for row in rows]


def gather_texts(transport: Transport, text: bytes) -> list[bytes]:
    """Every rank's `text`, of whatever length."""
    lengths = [int.from_bytes(row, "little") for row in _gather(transport, "lengths", len(text).to_bytes(8, "little"))]
    rows = _gather(transport, "texts", text.ljust(max(lengths)))
    return [row[:length] for row, length in zip(rows, lengths, strict=True)]


def wait(handle: Handle) -> Tensor:
    """`handle.wait()`, but a rank that never comes becomes an error instead of a hang."""
    seconds = float(os.environ.get(TIMEOUT_VARIABLE, DEFAULT_TIMEOUT))
    deadline = time.monotonic() + seconds
    while not handle.poll():
        if time.monotonic() > deadline:
            raise MismatchError(
                f"horovod compression: some rank did not begin its first compressed step within {seconds:g} s; "
                "Horovod's stall warning on rank 0 lists the missing ranks. There, compression-plugins is missing, or "
                f"the configuration did not arrive, or the first step takes longer: then raise {TIMEOUT_VARIABLE}"
            )
        time.sleep(1e-3)
    return handle.wait()
