"""What every benchmark of this package shares: a clock for the device, its copy rate, and the name of the machine."""

from __future__ import annotations

import contextlib
import datetime
import importlib.metadata
import pathlib
import platform
import statistics
import time
from collections.abc import Callable, Iterator

import torch

WARM_UP = 2


def median_seconds(call: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Median time of one call after warm-up; on CUDA the time between two events on the current stream."""
    for _ in range(WARM_UP):
        call()
    return statistics.median(_timed(call, device) for _ in range(repeats))


def copy_rate(numel: int, device: torch.device, repeats: int) -> float:
    """Bytes per second, read plus written, of a plain copy of ``numel`` fp32 elements."""
    source, target = torch.ones(numel, device=device), torch.empty(numel, device=device)
    return 2 * source.nbytes / median_seconds(lambda: target.copy_(source), device, repeats)


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """PyTorch on a single CPU thread: during training the other cores belong to backward."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def machine(device: torch.device) -> dict[str, str]:
    """Name of the device, date, and versions, for every published row."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()
    now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    return {"machine": name, "device": device.type, "date": now, "torch": torch.__version__} | {
        package: _version(package) for package in ("triton", "numba", "numpy")
    }


def _timed(call: Callable[[], object], device: torch.device) -> float:
    if device.type != "cuda":
        start = time.perf_counter()
        call()
        return time.perf_counter() - start
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    first.record()
    call()
    last.record()
    last.synchronize()
    return first.elapsed_time(last) / 1e3


def cpu_name() -> str:
    """The processor, as its maker calls it."""
    info = pathlib.Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def vector_unit() -> str:
    """The processor as LLVM knows it, and its widest vectors, for which Numba's loops are compiled."""
    from llvmlite import binding

    features = binding.get_host_cpu_features()
    widest = (name for name in ("avx512f", "avx2", "avx", "sse4.2", "sve", "neon") if features.get(name))
    return f"{binding.get_host_cpu_name()}, {next(widest, 'no vectors that it names')}"


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
