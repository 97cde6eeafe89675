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

    uneven = 0
    for lengths in ([5 * r for r in range(size)], [LONG * (r == 0) + 1 for r in range(size)]):  # short and long
        uneven += (size - 1) * lengths[rank]
        mine = torch.full((lengths[rank],), rank, dtype=torch.uint8)
        expected = torch.arange(size, dtype=torch.uint8).repeat_interleave(torch.tensor(lengths))
        assert torch.equal((yield job.all_gather_uneven(mine, lengths)), expected)

    send = [to + 1 for to in range(size)]  # rank `to` gets to + 1 elements from everybody
    outbox = torch.cat([torch.full((n,), 10 * rank + to, dtype=torch.uint8) for to, n in enumerate(send)])
    inbox = yield job.all_to_all(outbox, send, [rank + 1] * size)
    assert inbox.tolist() == [10 * source + rank for source in range(size) for _ in range(rank + 1)]

    mine = torch.full((4,), rank, dtype=torch.uint8)
    assert (yield job.broadcast(mine.clone(), size - 1)).tolist() == [size - 1] * 4

    right, left = (rank + 1) % size, (rank - 1) % size
    assert (yield job.send_recv(mine, to=right, source=left)).tolist() == [left] * 4

    # What a rank sends need not be as long as what it gets.
    lengths = [3 * r + (r > 0) for r in range(size)]
    outgoing = torch.full((lengths[rank],), rank, dtype=torch.uint8)
    incoming = yield job.send_recv(outgoing, to=right, source=left, receive=lengths[left])
    assert incoming.tolist() == [left] * lengths[left]

    around, reduced = (size - 1) / size, 0
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        for shards in _cuts(size):
            addend = (torch.arange(sum(shards)) % 7 + rank).to(dtype)  # sums are exact in every dtype
            kept = addend.clone()
            mine = yield job.reduce_scatter(addend, shards)
            start = sum(shards[:rank])
            expected = torch.arange(start, start + shards[rank]) % 7 * size + sum(range(size))
            assert mine.dtype == dtype and mine.tolist() == expected.tolist(), (dtype, shards)
            assert torch.equal(addend, kept), "the input is not modified"
            reduced += (sum(shards) - shards[rank]) * dtype.itemsize

    expected = (
        2 * around * (20 + 12)
        + (size - 1) * (2 + LONG)
        + uneven
        + (sum(send) - send[rank])
        + around * 4
        + (4 + lengths[rank] if size > 1 else 0)
        + reduced
    )
    assert abs(transport.sent - before - expected) < 1e-6, "sent counts what a ring would send"
    return total


def _cuts(size: int) -> list[list[int]]:
    """Shards that are even, uneven, empty at one rank, and empty at all but one."""
    return [[5] * size, [2 * r + 1 for r in range(size)], [r * 3 for r in range(size)], [0] * (size - 1) + [4]]
