"""Three ranks, of which two train together, and the transport's contract on a subset whose ranks count differently."""

from __future__ import annotations

import horovod.torch as hvd
import torch
from checks import backward, check, distance, identical, net, optimizer, report

from compression_plugins import Compression
from compression_plugins.errors import UnsupportedError
from compression_plugins.transports.horovod import HorovodTransport

PAIR = hvd.ProcessSet([0, 2])
hvd.init(process_sets=[PAIR])
torch.set_num_threads(1)
R = hvd.rank()


def run(compression: object, **options: object) -> torch.nn.Module:
    model = net()
    opt = optimizer(model, compression, **options)
    for step in range(3):
        opt.zero_grad()
        backward(model, step)
        opt.step()
    return model


@check
def a_process_set_equals_dense() -> float:
    exact = Compression.topk(ratio=1, min_numel=1)
    return distance(run(hvd.Compression.none, process_set=PAIR), run(exact, process_set=PAIR))


@check
def a_process_set_keeps_its_replicas_identical() -> dict[str, bool] | None:
    models = {
        name: run(getattr(Compression, name)(min_numel=1), process_set=PAIR) for name in ("scalecom", "qsgd", "marsit")
    }
    if not PAIR.included():
        return None
    return {name: identical(model, PAIR) for name, model in models.items()}


@check
def three_ranks_equal_dense() -> float:
    return distance(run(hvd.Compression.none), run(Compression.topk(ratio=1, min_numel=1)))


@check
def three_ranks_stay_identical() -> dict[str, bool]:
    names = ("scalecom", "marsit", "double_quantization", "powersgd", "signsgd", "ef_signsgd", "randomk", "fp8")
    return {name: identical(run(getattr(Compression, name)(min_numel=1))) for name in names}


@check
def what_goes_hop_by_hop_stays_identical() -> dict[str, bool]:
    """Horovod has no point-to-point operation; the transport makes one of an all-to-all."""
    noisy = {name: run(getattr(Compression, name)(min_numel=1), lr=1e-6) for name in ("ssdm", "cascading_ssdm")}
    forms = {form: run(Compression.marsit(min_numel=1, flush_steps=2, form=form)) for form in ("ring", "torus")}
    return {name: identical(model) for name, model in {**noisy, **forms}.items()}


@check
def a_torus_of_two_rows() -> str:
    try:
        optimizer(net(), Compression.marsit(min_numel=1, form="torus", rows=2))
    except UnsupportedError as error:
        return str(error)
    return "accepted"


@check
def ranks_that_leave_early_join_a_sum() -> list[int]:
    """Rank 1 has two steps, the others four; afterwards all count alike, so that shared random choices agree."""
    model = net()
    opt = optimizer(model, Compression.randomk(ratio=4, min_numel=1))
    for step in range(2 if R == 1 else 4):
        opt.zero_grad()
        backward(model, step)
        opt.step()
    hvd.join()
    return [opt._compression_session.reducer.step]


def transport_results(transport: HorovodTransport) -> dict[str, object]:
    rank, size = transport.rank, transport.size
    nxt, before = (rank + 1) % size, (rank - 1) % size
    mine = torch.arange(5, dtype=torch.float32) + 10 * rank
    kept = mine.clone()
    scope = transport.scoped("a")
    send, receive = [rank + to for to in range(size)], [rank + source for source in range(size)]
    cuts = [[2 * r + 1 for r in range(size)], [3 * r for r in range(size)]]  # uneven; and the first has nothing
    addends = [
        ((torch.arange(sum(cut)) % 7 + rank).to(dtype), cut) for dtype in (torch.float32, torch.float64) for cut in cuts
    ]
    handles = {
        "sum": scope.all_reduce(mine),
        "votes": scope.all_reduce(torch.full((6,), rank, dtype=torch.int32)),
        "gather": scope.all_gather(torch.full((3,), rank, dtype=torch.uint8)),
        "uneven": scope.all_to_all(torch.full((sum(send),), rank, dtype=torch.int32), send, receive),
        "root": scope.broadcast(mine, size - 1),
        "ring": scope.send_recv(torch.full((4,), rank, dtype=torch.uint8), nxt, before),
        "other": transport.scoped("b").all_reduce(mine),
        "empty": scope.all_gather(torch.empty(0, dtype=torch.uint8)),
        "lengths": scope.send_recv(torch.full((3 * rank,), rank, dtype=torch.uint8), nxt, before, 3 * before),
        **{f"shards {i}": scope.reduce_scatter(x, cut) for i, (x, cut) in enumerate(addends)},
    }
    out = {name: handle.wait() for name, handle in reversed(handles.items())}
    starts = [sum(cut[:rank]) for _, cut in addends]
    sums_of_shards = [
        ((torch.arange(start, start + cut[rank]) % 7) * size + sum(range(size))).to(x.dtype)
        for start, (x, cut) in zip(starts, addends)
    ]
    scattered = sum((len(x) - cut[rank]) * x.element_size() for x, cut in addends)
    sums, gathered, sent_on = 20 + 24 + 20, 3, 4 * (sum(send) - send[rank]) + scattered
    sent_on += 4 + 3 * rank if size > 1 else 0
    sent = (size - 1) * (2 * sums / size + gathered + 20 / size) + sent_on
    everyone = [torch.arange(5.0) + 10 * r for r in range(size)]
    return {
        "sum": torch.equal(out["sum"], sum(everyone)) and torch.equal(out["other"], sum(everyone)),
        "votes": out["votes"].tolist() == [sum(range(size))] * 6,
        "gather": out["gather"].tolist() == [[r] * 3 for r in range(size)],
        "uneven": out["uneven"].tolist() == [source for source in range(size) for _ in range(receive[source])],
        "root": torch.equal(out["root"], everyone[size - 1]),
        "ring": out["ring"].tolist() == [before] * 4,
        "empty": list(out["empty"].shape) == [size, 0],
        "lengths": out["lengths"].tolist() == [before] * 3 * before,
        "shards": all(torch.equal(out[f"shards {i}"], x) for i, x in enumerate(sums_of_shards)),
        "input is left alone": torch.equal(mine, kept),
        "sent": abs(transport.sent - sent) < 1e-9,
    }


@check
def transport_contract() -> dict[str, object]:
    return transport_results(HorovodTransport("contract"))


@check
def transport_contract_in_a_process_set() -> dict[str, object] | None:
    return transport_results(HorovodTransport("contract", PAIR)) if PAIR.included() else None


@check
def transport_contract_in_a_group() -> dict[str, object]:
    """The first two ranks, and the last one alone."""
    transport = HorovodTransport("groups").subgroup([2] if R == 2 else [1, 0])
    return {"place": [transport.rank, transport.size], **transport_results(transport)}


hvd.barrier()  # a rank that ends shuts Horovod down for all, and rank 1 has less to do
report()
