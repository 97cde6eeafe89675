"""Long messages between Gloo ranks go both ways at once, by sends and receives of their own.

They give the bits of the backend's collectives, and keep apart from whatever else the script does on the same group.
"""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from compression_plugins.transports import torch_distributed
from compression_plugins.transports.torch_distributed import TorchDistributed, _Exchange

SHORT = torch_distributed._SHORT
LONG = 2 * SHORT  # bytes
TIMEOUT_S = 5


def _run(rank: int, size: int, folder: str) -> None:
    """Every body of `WHOLE`, one after the other on the same group; each that ends leaves a file of its name."""
    torch.set_num_threads(1)
    where, timeout = f"file://{folder}/rendezvous", timedelta(seconds=60)
    dist.init_process_group("gloo", init_method=where, rank=rank, world_size=size, timeout=timeout)
    for body in WHOLE:
        body(TorchDistributed())
        dist.barrier()
        if rank == 0:
            (Path(folder) / body.__name__).touch()
    dist.destroy_process_group()


def _run_broken(rank: int, body: Callable[..., None], rendezvous: str) -> None:
    torch.set_num_threads(1)
    timeout = timedelta(seconds=TIMEOUT_S)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2, timeout=timeout)
    body(TorchDistributed())


def _values(numel: int, rank: int, seed: int = 0) -> Tensor:
    return torch.randn(numel, generator=torch.Generator().manual_seed(100 * seed + rank))


def _gathered(x: Tensor, size: int) -> Tensor:
    rows = [torch.empty_like(x) for _ in range(size)]
    dist.all_gather(rows, x)
    return torch.stack(rows)


def _lengths_around_the_threshold(transport: TorchDistributed) -> None:
    rank, size = transport.rank, transport.size
    at = SHORT // 4 // size
    for numel in (at - 1, at, at + 1, 3 * at + 1):
        x = _values(numel, rank)
        kept, before = x.clone(), transport.sent
        handle = transport.scoped("gather").all_gather(x)
        assert isinstance(handle, _Exchange) == (4 * numel * size > SHORT)
        assert torch.equal(handle.wait(), _gathered(kept, size))
        assert torch.equal(x, kept), "the input is not modified"
        assert transport.sent - before == (size - 1) * 4 * numel
    bytes_ = torch.arange(LONG, dtype=torch.int64).add(rank).to(torch.uint8)
    assert torch.equal(transport.all_gather(bytes_).wait(), _gathered(bytes_, size))


def _uneven_and_empty_parts(transport: TorchDistributed) -> None:
    rank, size = transport.rank, transport.size
    for send in (
        [LONG] * size,
        [(to + 1) * LONG for to in range(size)],
        [0] * (size - 1) + [LONG],
        [LONG] + [0] * (size - 1),
    ):
        parts = [_values(n, rank, to) for to, n in enumerate(send)]
        handle = transport.all_to_all(torch.cat(parts), send, [send[rank]] * size)
        assert isinstance(handle, _Exchange)
        expected = torch.cat([_values(send[rank], source, rank) for source in range(size)])
        assert torch.equal(handle.wait(), expected)
    right, left = (rank + 1) % size, (rank - 1) % size
    around = transport.send_recv(_values(LONG, rank), to=right, source=left)
    own = transport.send_recv(_values(LONG, rank), to=rank, source=rank)
    assert isinstance(around, _Exchange) and isinstance(own, _Exchange)
    assert torch.equal(around.wait(), _values(LONG, left)) and torch.equal(own.wait(), _values(LONG, rank))
    lengths = [r * LONG + 1 for r in range(size)]  # rank 0's is short: no rank can tell from its own
    told = transport.send_recv(_values(lengths[rank], rank), to=right, source=left, receive=lengths[left])
    assert torch.equal(told.wait(), _values(lengths[left], left))


def _among_the_operations_of_a_script(transport: TorchDistributed) -> None:
    rank, size = transport.rank, transport.size
    right, left = (rank + 1) % size, (rank - 1) % size
    other = TorchDistributed()  # of a second model, on the same group
    for late in range(size):
        theirs = torch.empty(LONG)
        post = dist.irecv(theirs, left)  # with tag 0
        if rank == late:
            time.sleep(0.05)
        handles = [transport.all_gather(_values(LONG, rank, 1))]
        total = _values(LONG, rank, 2)
        reduced = dist.all_reduce(total, async_op=True)
        handles.append(other.all_gather(_values(LONG, rank, 3)))
        handles.append(transport.scoped("short").all_gather(_values(10, rank, 4)))
        sent = dist.isend(_values(LONG, rank, 5), right)
        handles.append(transport.scoped("long").all_gather(_values(LONG + 1, rank, 6)))
        handles.append(transport.all_to_all(_values(size * LONG, rank, 7), [LONG] * size, [LONG] * size))
        dist.barrier()
        order = list(range(len(handles)))
        results = {i: handles[i].wait() for i in (reversed(order) if rank == late else order)}
        for i, (numel, seed) in enumerate([(LONG, 1), (LONG, 3), (10, 4), (LONG + 1, 6)]):
            assert torch.equal(results[i], torch.stack([_values(numel, r, seed) for r in range(size)])), i
        mine = slice(rank * LONG, (rank + 1) * LONG)
        assert torch.equal(results[4], torch.cat([_values(size * LONG, r, 7)[mine] for r in range(size)]))
        for work in (post, reduced, sent):
            work.wait()
        assert torch.equal(theirs, _values(LONG, left, 5))
        torch.testing.assert_close(total, sum(_values(LONG, r, 2) for r in range(size)))


def _receives_are_posted_first(transport: TorchDistributed) -> None:
    posted: list[str] = []

    def noting(name: str, start: Any) -> Any:
        return lambda *arguments: (posted.append(name), start(*arguments))[1]

    names = ["irecv", "isend"]
    originals = {name: getattr(dist, name) for name in names}
    for name in names:
        setattr(dist, name, noting(name, originals[name]))
    transport.all_gather(torch.zeros(LONG)).wait()
    for name in names:
        setattr(dist, name, originals[name])
    assert posted == ["irecv"] * (transport.size - 1) + ["isend"] * (transport.size - 1)


def _abandoned_ones_do_not_disturb(transport: TorchDistributed) -> None:
    rank, size = transport.rank, transport.size
    transport._numbers = itertools.count(torch_distributed._TAGS - 3)  # and numbers begin anew
    for turn in range(6):
        x = _values(LONG, rank, turn)
        handle = transport.scoped("aborted").all_gather(x)
        del handle, x
        kept = transport.all_gather(_values(LONG, rank, turn + 10)).wait()
        assert torch.equal(kept, torch.stack([_values(LONG, r, turn + 10) for r in range(size)]))
        assert not transport._flying, "nothing is held longer than it must"


def _a_rank_that_dies_before(transport: TorchDistributed) -> None:
    if transport.rank == 1:
        os._exit(0)
    for _ in range(2):
        with pytest.raises(RuntimeError):
            transport.all_gather(torch.zeros(LONG)).wait()


def _a_rank_that_dies_amid_a_message(transport: TorchDistributed) -> None:
    with pytest.raises(RuntimeError):
        while True:  # what had left before may still arrive
            handle = transport.all_gather(torch.zeros(32 * LONG))
            if transport.rank == 1:
                os._exit(0)
            handle.wait()


def _a_rank_that_never_comes(transport: TorchDistributed) -> None:
    store = dist.distributed_c10d._get_default_store()
    if transport.rank == 0:
        with pytest.raises(RuntimeError, match=f"{TIMEOUT_S}000ms"):
            transport.all_gather(torch.zeros(LONG)).wait()
        store.set("seen", "1")
    else:
        store.wait(["seen"], timedelta(seconds=4 * TIMEOUT_S))


WHOLE = [
    _lengths_around_the_threshold,
    _uneven_and_empty_parts,
    _among_the_operations_of_a_script,
    _receives_are_posted_first,
    _abandoned_ones_do_not_disturb,
]
BROKEN = [_a_rank_that_dies_before, _a_rank_that_dies_amid_a_message, _a_rank_that_never_comes]


@pytest.fixture(scope="module", params=[2, 3], ids=["2 ranks", "3 ranks"])
def ended(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[set[str], str]:
    """Names of the bodies that have passed, and what stopped the one after them."""
    folder, stopped = tmp_path_factory.mktemp("exchanges"), ""
    try:
        mp.spawn(_run, (request.param, str(folder)), nprocs=request.param)
    except Exception as error:
        stopped = str(error)
    return {path.name for path in folder.iterdir()}, stopped


@pytest.mark.parametrize("body", WHOLE, ids=lambda body: body.__name__[1:])
def test_exchanges(body: Callable[..., None], ended: tuple[set[str], str]) -> None:
    names, stopped = ended
    assert body.__name__ in names, stopped


@pytest.mark.parametrize("body", BROKEN, ids=lambda body: body.__name__[1:])
def test_a_rank_that_is_missing_is_an_error_within_the_timeout_of_the_group(
    body: Callable[..., None], tmp_path: Path
) -> None:
    began = time.monotonic()
    mp.spawn(_run_broken, (body, str(tmp_path / "rendezvous")), nprocs=2)
    assert time.monotonic() - began < 30 + TIMEOUT_S
