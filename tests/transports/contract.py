"""One contract for every transport: `check(transport)` runs on each of its ranks, in whatever process that is."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

import torch

from compression_plugins.transports.base import Handle, Transport

LONG = 1 << 19  #: bytes: no transport treats this as a short payload


def check(transport: Transport, name: str = "contract") -> Generator[Handle, Any, torch.Tensor]:
    """Yields handles, is sent their results and raises AssertionError where the contract is broken."""
    rank, size = transport.rank, transport.size
    job = transport.scoped(name)
    before = transport.sent

    values = torch.arange(5.0) + 10 * rank
    total = yield job.all_reduce(values)
    assert total.tolist() == [size * i + 10 * sum(range(size)) for i in range(5)]
    assert values.tolist() == [i + 10 * rank for i in range(5)], "the input is not modified"
    words = torch.full((3,), 1 << rank, dtype=torch.int32)
    assert (yield job.all_reduce(words)).tolist() == [(1 << size) - 1] * 3

    rows = yield job.all_gather(torch.tensor([rank, 7], dtype=torch.uint8))
    assert rows.tolist() == [[r, 7] for r in range(size)]
    long = torch.full((LONG,), rank, dtype=torch.uint8)
    assert torch.equal((yield job.all_gather(long)), torch.arange(size, dtype=torch.uint8).view(-1, 1).expand(-1, LONG))

    send = [to + 1 for to in range(size)]  # rank `to` gets to + 1 elements from everybody
    outbox = torch.cat([torch.full((n,), 10 * rank + to, dtype=torch.uint8) for to, n in enumerate(send)])
    inbox = yield job.all_to_all(outbox, send, [rank + 1] * size)
    assert inbox.tolist() == [10 * source + rank for source in range(size) for _ in range(rank + 1)]

    mine = torch.full((4,), rank, dtype=torch.uint8)
    assert (yield job.broadcast(mine.clone(), size - 1)).tolist() == [size - 1] * 4

    right, left = (rank + 1) % size, (rank - 1) % size
    assert (yield job.send_recv(mine, to=right, source=left)).tolist() == [left] * 4

    around = (size - 1) / size
    expected = (
        2 * around * (20 + 12)
        + (size - 1) * (2 + LONG)
        + (sum(send) - send[rank])
        + around * 4
        + (4 if size > 1 else 0)
    )
    assert abs(transport.sent - before - expected) < 1e-6, "sent counts what a ring would send"
    return total
