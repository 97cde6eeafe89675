"""What each scheme costs and loses: one bucket, reduced by ranks that live in this process.

Times are of one rank's own work (encode, decode, average; nothing travels), as ratios to `bf16` in the same run,
because bf16 is what a skeptic would use instead. Errors are of the averaged gradient after `steps` steps with a fixed
gradient a rank: `vNMSE` = ||mean of results - mean gradient||^2 / ||mean gradient||^2 of a single step, `bias` the same
of the mean over steps, which error feedback and unbiased rounding make small.
"""

from __future__ import annotations

import json
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from ..config import Config
from ..engine.plan import Bucket, Segment
from ..schemes import registry
from .ranks import Ranks
from .table import aligned
from .timing import machine, one_thread


@dataclass(frozen=True)
class SchemeRow:
    """One scheme on one bucket. Times are medians over steps."""

    scheme: str
    ranks: int
    bits_per_value: float
    ratio: float
    milliseconds: float
    time_vs_bf16: float
    vnmse: float
    bias: float
    state_bytes_per_value: float


def measure(
    names: list[str] | None = None, numel: int = 1 << 20, ranks: int = 2, steps: int = 10, device: str = "cpu"
) -> list[SchemeRow]:
    """Rows for `names` (default: every registered scheme); `bf16` is always measured, as the unit of time."""
    wanted = names or registry.names()
    rows = {name: _measure(name, numel, ranks, steps, device) for name in dict.fromkeys(["bf16", *wanted])}
    unit = rows["bf16"]["milliseconds"]
    return [SchemeRow(time_vs_bf16=rows[name]["milliseconds"] / unit, **rows[name]) for name in wanted]


def table(rows: list[SchemeRow]) -> str:
    """The rows as aligned plain text, with a line of titles."""
    header = ["scheme", "bits/value", "ratio", "ms", "x bf16", "vNMSE", "bias", "state B/value"]
    lines = [header]
    for row in rows:
        numbers = (
            row.bits_per_value,
            row.ratio,
            row.milliseconds,
            row.time_vs_bf16,
            row.vnmse,
            row.bias,
            row.state_bytes_per_value,
        )
        lines.append([row.scheme, *(f"{number:.3g}" for number in numbers)])
    return "\n".join(aligned(lines))


def run(device: str, names: list[str] | None, numel: int, ranks: int, steps: int, json_file: Path | None) -> None:
    """Measure, print the table, and write one JSON object a row with the machine and the date."""
    with one_thread():
        rows = measure(names, numel, ranks, steps, device)
    about = machine(torch.device(device))
    print(f"{about['machine']}, {about['date']}; {numel:,} values, {ranks} ranks, one thread\n\n{table(rows)}")
    if json_file is not None:
        json_file.write_text("".join(json.dumps({**about, **asdict(row)}) + "\n" for row in rows))


def _measure(name: str, numel: int, ranks: int, steps: int, device: str) -> dict:
    side = max(1, int(numel**0.5))
    bucket = Bucket(registry.get(name)(), (Segment("weight", 0, side * side, (side, side)),), device)
    world = Ranks(Config.load({"scheme": name}), ranks)
    generator = torch.Generator().manual_seed(0)
    shared = torch.randn(bucket.numel, generator=generator)
    gradients = [(shared + torch.randn(bucket.numel, generator=generator)).to(device) for _ in range(ranks)]
    target = torch.stack(gradients).mean(0)
    times, errors, total = [], [], torch.zeros_like(target)
    for step in range(steps + 1):
        inputs = [[g.clone()] for g in gradients]
        _synchronize(device)
        started = time.perf_counter()
        (result,) = world.average([bucket], inputs)
        _synchronize(device)
        elapsed = time.perf_counter() - started
        world.end_step()
        if step:  # the first one compiles
            times.append(elapsed / ranks * 1e3)
            errors.append(_relative(result, target))
            total += result / steps
    bits = 8 * bucket.wire_bytes(ranks) / bucket.numel
    dense = 64 * (ranks - 1) / ranks
    return {
        "scheme": name,
        "ranks": ranks,
        "bits_per_value": bits,
        "ratio": dense / bits if bits else 1.0,
        "milliseconds": statistics.median(times),
        "vnmse": statistics.mean(errors),
        "bias": _relative(total, target),
        "state_bytes_per_value": world.reducers[0].state.nbytes() / bucket.numel,
    }


def _relative(result: torch.Tensor, target: torch.Tensor) -> float:
    return float((result - target).square().sum() / target.square().sum())


def _synchronize(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()
