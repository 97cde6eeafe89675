"""Checksums change no result, and find every damaged message; the error names the rank that it came from."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor

from compression_plugins.engine.reducer import Reducer
from compression_plugins.transports.verified import SEAL, DamagedError, Verified, _checksum

from ..ordered import OrderedTransport, OrderedWorld
from ..world import World, config


def test_a_checksum_finds_one_bit_a_missing_piece_and_pieces_that_changed_places() -> None:
    dice = random.Random(0)
    for numel in (1, 7, 8, 9, 64, 1000):
        data = torch.randint(0, 256, (numel,), dtype=torch.uint8, generator=torch.Generator().manual_seed(numel))
        whole = _checksum(data)
        assert len(whole) == SEAL
        for _ in range(50):
            bad = data.clone()
            bad[dice.randrange(numel)] ^= 1 << dice.randrange(8)
            assert not torch.equal(_checksum(bad), whole)
        assert not torch.equal(_checksum(data[:-1]), whole)
        assert not torch.equal(_checksum(torch.cat([data, data.new_zeros(1)])), whole)
    swapped = torch.cat([data[8:16], data[:8], data[16:]])
    assert not torch.equal(_checksum(swapped), whole)


@pytest.mark.parametrize("size", [2, 3])
def test_operations_give_what_they_give_without_checksums(size: int) -> None:
    def run(rank: int, transport: OrderedTransport) -> None:
        plain, verified = transport, Verified(transport)
        x = torch.arange(12, dtype=torch.float32) + 100 * rank
        before = verified.sent
        for way in (lambda t: t.all_gather(x), lambda t: t.all_gather(x.to(torch.bfloat16)), lambda t: t.all_reduce(x),
                    lambda t: t.broadcast(x, size - 1), lambda t: t.all_gather(x[:0]),
                    lambda t: t.send_recv(x, (rank + 1) % size, (rank - 1) % size),
                    lambda t: t.reduce_scatter(x, [12 - 2 * (size - 1)] + [2] * (size - 1)),
                    lambda t: t.scoped("a").all_gather(x.to(torch.uint8))):  # fmt: skip
            a, b = way(plain).wait(), way(verified).wait()
            assert torch.equal(a, b) and a.dtype == b.dtype and a.shape == b.shape
        assert verified.sent - before > 0
        send = [to + 1 for to in range(size)]
        outbox = torch.arange(sum(send), dtype=torch.int32) + 10 * rank
        a, b = (t.all_to_all(outbox, send, [rank + 1] * size).wait() for t in (plain, verified))
        assert torch.equal(a, b)

    OrderedWorld(size, ordered=False).each(run)


@pytest.mark.parametrize("scheme", ["topk", "scalecom", "qsgd", "ef_signsgd", "ssdm", "cascading_ssdm"])
def test_a_damaged_payload_ends_the_reduction_and_names_its_sender(
    scheme: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rank 1 of 2 gets one flipped bit from rank 0, in the first message that is not a sum."""
    cfg = config(scheme, verify=True)
    world = World(cfg, 2)
    plan, gradients = world.plan, world.gradients(0)
    original = Verified._opened

    def damage(self: Verified, data: Tensor, like: Tensor, rank: int) -> Tensor:
        if self.rank == 1 and rank == 0 and len(data) > SEAL:
            data = data.clone()
            data[len(data) // 3] ^= 4
        return original(self, data, like, rank)

    def run(rank: int, transport: OrderedTransport) -> Any:
        return Reducer(cfg, transport).reduce(plan.buckets[0], gradients[rank].clone())

    whole = OrderedWorld(2, ordered=False).each(run)
    plain = World(config(scheme), 2).step(gradients)
    assert all(torch.equal(a, b) for a, b in zip(whole, plain)), "checksums change nothing"
    monkeypatch.setattr(Verified, "_opened", damage)
    told = "what rank 0 has sent to rank 1 for the bucket of 'second.weight' arrived damaged"
    with pytest.raises(DamagedError, match=told):
        OrderedWorld(2, ordered=False).each(run)
