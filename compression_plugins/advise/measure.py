"""Measures the network between the ranks of the job that this process belongs to."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from ..errors import ConfigError, UnsupportedError
from .network import KINDS, Line, Measured, fit
from .work import sent_bytes

if TYPE_CHECKING:
    from torch import Tensor

    from ..transports.base import Handle, Transport
    from .simulate import Host

SIZES = tuple(4 << 10 << 2 * i for i in range(7))  # bytes sent: 4 KiB to 16 MiB
#: Seconds for each kind of collective, where the network is slow.
_BUDGET_S = {"all_reduce": 4.0, "all_gather": 2.5, "all_to_all": 2.0, "broadcast": 1.0, "exchange": 1.0}
_TOGETHER = 8
_REPEATS = 7


def in_job() -> Host | None:
    """The host framework whose launcher started this process, torchrun's being DDP; None outside of jobs."""
    if "HOROVOD_RANK" in os.environ:
        return "horovod"
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return "ddp"
    return "deepspeed" if {"RANK", "WORLD_SIZE", "MASTER_ADDR"} <= os.environ.keys() else None


def connect(launcher: str, device: str) -> Transport:
    """The ranks of the job.

    Raises:
        UnsupportedError: the host framework is not installed, or there is a single rank.
    """
    if launcher == "horovod":
        try:
            import horovod.torch as hvd
        except ImportError as error:
            raise UnsupportedError(
                f"advise runs under horovodrun, but horovod.torch cannot be imported: {error}"
            ) from None
        from ..transports.horovod import HorovodTransport

        hvd.init()
        transport: Transport = HorovodTransport("advise")
    else:
        import torch.distributed as dist

        from ..transports.torch_distributed import TorchDistributed

        dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")
        transport = TorchDistributed()
    if transport.size < 2:
        raise ConfigError(
            "a job of one rank has no network to measure: start two or more, or give --ranks and --bandwidth"
        )
    return transport


def disconnect(launcher: str) -> None:
    """Leave the host framework that `connect` has joined."""
    if launcher == "horovod":
        import horovod.torch as hvd

        hvd.shutdown()
    else:
        import torch.distributed as dist

        dist.destroy_process_group()


def measure(transport: Transport, device: str, name: str) -> Measured:
    """Latency and rate of every kind of collective. All ranks call it together.

    Sizes grow until one more would take longer than the kind's budget; the ranks agree on when to stop.
    """
    found = {kind: _line(transport, kind, device, _BUDGET_S[kind]) for kind in KINDS}
    _, cpu_s, post_s = found["all_reduce"]
    return Measured(transport.size, {kind: line for kind, (line, _, _) in found.items()}, cpu_s, post_s, name)


def over_ranks(transport: Transport, values: list[float]) -> Tensor:
    """Every rank's `values` as rows, float64 [ranks, len(values)]; the same on every rank."""
    x = torch.tensor(values, dtype=torch.float64)
    rows = transport.scoped("values").all_gather(x.view(torch.uint8).to(_device(transport))).wait()
    return rows.cpu().contiguous().view(torch.float64)


def _device(transport: Transport) -> str:
    import torch.distributed as dist

    group = getattr(transport, "group", None)
    return "cuda" if group is not None and dist.get_backend(group) == "nccl" else "cpu"


def _line(transport: Transport, kind: str, device: str, budget_s: float) -> tuple[Line, float, float]:
    """The line, CPU seconds a byte of the largest size, and seconds to start one."""
    points: list[tuple[float, float]] = []
    cpu = 0.0
    spent = expected = 0.0
    for size in SIZES:
        repeats = _REPEATS if not points else int(max(3, min(_REPEATS, budget_s / 8 / expected)))
        warm = True
        if points and spent + (repeats + warm) * expected > budget_s:
            repeats, warm = 1, False  # what takes long is not much longer at first
            if spent + expected > budget_s:
                break
        x = _payload(kind, size, transport.size, device)
        name = f"{kind}.{size}"
        if warm:
            _run(transport, kind, x, name, device)
        walls, busy = [], 0.0
        for _ in range(repeats):
            if kind == "broadcast":  # its root would run ahead
                over_ranks(transport, [0.0])
            process, thread = time.process_time(), time.thread_time()
            walls.append(_run(transport, kind, x, name, device))
            busy += time.process_time() - process - (time.thread_time() - thread)
        wall, busy = over_ranks(transport, [statistics.median(walls), busy / repeats]).amax(0).tolist()
        sent = sent_bytes(kind, x.numel() * x.element_size(), transport.size)
        points.append((sent, wall))
        cpu = max(0.0, busy) / sent
        spent += (repeats + warm) * wall
        expected = 4 * wall
    line = fit(points)
    small = _payload(kind, SIZES[0], transport.size, device)
    post_s, together = over_ranks(transport, _together(transport, kind, small, device)).amax(0).tolist()
    gap = (together - points[0][1]) / (_TOGETHER - 1) - line.beta_s * points[0][0]
    return replace(line, gap_s=min(line.alpha_s, max(0.0, gap))), cpu, post_s


def _payload(kind: str, sent: int, size: int, device: str) -> Tensor:
    """What a rank hands over so that about `sent` bytes leave it; a whole number of words for each rank."""
    words = max(1, round(sent / sent_bytes(kind, 4, size) / size)) * size
    return torch.ones(words, device=device)


def _start(transport: Transport, kind: str, x: Tensor) -> Handle:
    size, rank = transport.size, transport.rank
    starts: dict[str, Callable[[], Handle]] = {
        "all_reduce": lambda: transport.all_reduce(x),
        "all_gather": lambda: transport.all_gather(x),
        "all_to_all": lambda: transport.all_to_all(x, [x.numel() // size] * size, [x.numel() // size] * size),
        "broadcast": lambda: transport.broadcast(x, 0),
        "exchange": lambda: transport.send_recv(x, (rank + 1) % size, (rank - 1) % size),
    }
    return starts[kind]()


def _run(transport: Transport, kind: str, x: Tensor, name: str, device: str) -> float:
    """Seconds of one collective; the name is the same in every repetition, as it is in training."""
    began = time.perf_counter()
    _start(transport.scoped(name), kind, x).wait()
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
    return time.perf_counter() - began


def _together(transport: Transport, kind: str, x: Tensor, device: str) -> list[float]:
    """Several small ones in flight at once: seconds to start each, and until all are done."""
    posts, times = [], []
    for _ in range(4):
        began = time.perf_counter()
        handles = [_start(transport.scoped(f"{kind}.together{i}"), kind, x) for i in range(_TOGETHER)]
        posts.append((time.perf_counter() - began) / _TOGETHER)
        for handle in handles:
            handle.wait()
        if device.startswith("cuda"):
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - began)
    return [statistics.median(posts[1:]), statistics.median(times[1:])]
