"""Many steps with all schemes in turn, two ranks over Gloo: memory stays flat, residuals stay bounded.

python -m launch.soak                     20,000 steps, 20 minutes at most; writes docs/benchmarks/soak.png
python -m launch.soak --steps 500 --out out/soak.png

Every scheme trains a small transformer-like model for some steps, by torch DDP, then gives way to the next, again and
again: sessions, communication hooks, states and their memory come and go as in the long life of a process. Resident
memory and the norms of residuals are sampled; the run fails if memory grows by more than 5 % from its first quarter to
its last, or if a residual grows beyond what it was in the first round of its scheme by more than a factor of 4.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import socket
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import compression_plugins.ddp as compression
from compression_plugins.adapters.ddp import find
from compression_plugins.schemes import registry

RANKS, STEPS, TURN, MINUTES = 2, 20_000, 50, 20.0
GROWTH, RESIDUAL = 1.05, 4.0
_OUT = Path(__file__).parents[1] / "docs/benchmarks/soak.png"
#: A learning rate at which each trains; the others take 0.05.
_RATES = {"cascading_ssdm": 1e-5, "signsgd": 1e-3, "ssdm": 1e-3, "marsit": 1e-2}


def main(argv: list[str] | None = None) -> int:
    """The command; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=STEPS, help="of all schemes together")
    parser.add_argument("--turn", type=int, default=TURN, help="steps of a scheme until the next one takes over")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="after which no scheme takes over any more")
    parser.add_argument("--out", type=Path, default=_OUT, help="picture; the samples go beside it, as JSON")
    options = parser.parse_args(argv)
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    options.out.parent.mkdir(parents=True, exist_ok=True)
    record = options.out.with_suffix(".json")
    mp.spawn(_rank, (port, options.steps, options.turn, 60 * options.minutes, str(record)), nprocs=RANKS)
    samples = json.loads(record.read_text())
    draw(samples, options.out)
    faults = judge(samples)
    for fault in faults:
        print(f"soak: {fault}", file=sys.stderr)
    print(headline(samples))
    return 1 if faults else 0


def _rank(rank: int, port: int, steps: int, each: int, limit_s: float, record: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=RANKS)
    schemes = [name for name in registry.names() if registry.get(name).trains]
    samples: list[dict[str, Any]] = []
    began, done, turn = time.monotonic(), 0, 0
    while done < steps:
        scheme = schemes[turn % len(schemes)]
        count = min(each, steps - done)
        norm, loss = _train(scheme, count, rank)
        done, turn = done + count, turn + 1
        gc.collect()
        samples.append({
            "step": done, "scheme": scheme, "round": turn // len(schemes), "residual_norm": norm, "loss": loss,
            "rss_mb": _resident_mb(), "seconds": time.monotonic() - began,
        })  # fmt: skip
        over = torch.tensor([float(time.monotonic() - began > limit_s)])
        dist.all_reduce(over)  # the ranks stop together
        if over:
            break
    if rank == 0:
        Path(record).write_text("[\n" + ",\n".join(map(json.dumps, samples)) + "\n]\n")
    dist.barrier()
    sys.stderr.flush()
    os._exit(0)  # tearing down a Gloo group after many DDP models was seen to wait for ever, with nothing in flight


def _train(scheme: str, steps: int, rank: int) -> tuple[float, float]:
    """(norm of this rank's residuals, last loss)."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(64, 32), nn.Linear(32, 128), nn.ReLU(), nn.Linear(128, 64))
    ddp = DistributedDataParallel(model)
    compression.compress(ddp, scheme, min_numel=0, bucket_mb=0.02)
    optimizer = torch.optim.SGD(ddp.parameters(), lr=_RATES.get(scheme, 0.05))
    generator, loss = torch.Generator().manual_seed(rank), torch.zeros(())
    for _ in range(steps):
        x = torch.randint(64, (32,), generator=generator)
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(ddp(x), (7 * x + 3) % 64)
        loss.backward()
        optimizer.step()
    return find(ddp).session.reducer.state.norm(), float(loss.detach())


def _resident_mb() -> float:
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def judge(samples: list[dict[str, Any]]) -> list[str]:
    """What is wrong, a sentence each; samples of the first round do not count for memory, in which kernels compile."""
    faults = []
    settled = [s["rss_mb"] for s in samples if s["round"] > 0] or [s["rss_mb"] for s in samples]
    quarter = max(1, len(settled) // 4)
    first, last = (sum(part) / quarter for part in (settled[:quarter], settled[-quarter:]))
    if last > GROWTH * first:
        faults.append(f"memory grew from {first:.1f} to {last:.1f} MB")
    norms: dict[str, list[float]] = {}
    for sample in samples:
        norms.setdefault(sample["scheme"], []).append(sample["residual_norm"])
    for scheme, values in norms.items():
        if not all(value <= RESIDUAL * max(values[0], 1e-6) for value in values):
            faults.append(f"residuals of {scheme} grew from {values[0]:.3g} to {max(values):.3g}")
    if any(not sample["loss"] < float("inf") for sample in samples):
        faults.append("a loss is not finite")
    return faults


def headline(samples: list[dict[str, Any]]) -> str:
    """One sentence."""
    settled = [s["rss_mb"] for s in samples if s["round"] > 0] or [s["rss_mb"] for s in samples]
    return (
        f"{samples[-1]['step']:,} steps, {len({s['scheme'] for s in samples})} schemes in turn on {RANKS} ranks, "
        f"{samples[-1]['seconds']:.0f} s: resident memory of rank 0 from {min(settled):.1f} to {max(settled):.1f} MB "
        "after the first round"
    )


def draw(samples: list[dict[str, Any]], out: Path) -> None:
    """Memory above, residuals below."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (memory, residual) = pyplot.subplots(2, 1, sharex=True, figsize=(8, 6))
    memory.plot([s["step"] for s in samples], [s["rss_mb"] for s in samples])
    memory.set(ylabel="resident memory, MB", ylim=(0, None))
    for scheme in dict.fromkeys(s["scheme"] for s in samples):
        mine = [s for s in samples if s["scheme"] == scheme and s["residual_norm"]]
        if mine:
            residual.plot([s["step"] for s in mine], [s["residual_norm"] for s in mine], ".-", label=scheme)
    residual.set(xlabel="step", ylabel="norm of the residuals, rank 0", yscale="log")
    residual.legend(fontsize="x-small", ncols=3)
    figure.tight_layout()
    figure.savefig(out, dpi=110)
    pyplot.close(figure)


if __name__ == "__main__":
    raise SystemExit(main())
