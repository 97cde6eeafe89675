"""A job that torchrun starts again after rank 1 was killed in mid-step; then what damaged files are answered with.

Argument: a folder, where checkpoints and in the end each rank's report are.
"""

from __future__ import annotations

import contextlib
import io
import os
import signal
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from compression_plugins import ddp as compression
from compression_plugins.engine.saved import write

sys.path.insert(0, str(Path(__file__).parents[2]))
import state_damage

FOLDER = Path(sys.argv[1])
CONFIG = {"scheme": "scalecom", "ratio": 8, "min_numel": 0, "direction": {"kind": "momentum", "momentum": 0.5}}
KILLED, END = 7, 12


def build():
    torch.manual_seed(0)
    model = DistributedDataParallel(nn.Sequential(nn.Linear(16, 64), nn.Tanh(), nn.Linear(64, 8)))
    compression.compress(model, CONFIG)
    return model, torch.optim.SGD(model.parameters(), lr=0.1)


def step(model, optimizer, number, dies=False):
    x = torch.randn(8, 16, generator=torch.Generator().manual_seed(10 * number + dist.get_rank()))
    optimizer.zero_grad()
    model(x).square().mean().backward()
    if dies and dist.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    optimizer.step()


def digest(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()]).double().cumsum(0).sum().item()


def train(dies):
    """From the newest checkpoint to the end, with a checkpoint every second step."""
    model, optimizer = build()
    first = 0
    if (FOLDER / "model.pt").exists():
        saved = torch.load(FOLDER / "model.pt", weights_only=True)
        model.module.load_state_dict(saved["model"])
        first = saved["step"]
        compression.load(model, FOLDER / f"memory{first}")
    for number in range(first, END):
        step(model, optimizer, number, dies and number == KILLED)
        if number % 2:
            compression.save(model, FOLDER / f"memory{number + 1}")
            dist.barrier()
            if dist.get_rank() == 0:
                write({"model": model.module.state_dict(), "step": number + 1}, FOLDER / "model.pt")
            dist.barrier()
    return model, first


def straight():
    model, optimizer = build()
    for number in range(END):
        step(model, optimizer, number)
    return digest(model)


def refusal(kind):
    """What a rank is told that loads rank 1's damaged file with the others': before the first step, and later."""
    folder = FOLDER / f"damaged {kind}"
    if dist.get_rank() == 0:
        state_damage.damage(kind, FOLDER / f"memory{END}", folder, "compression")
    dist.barrier()
    told = []
    for steps in (0, 1):
        model, optimizer = build()
        for number in range(steps):
            step(model, optimizer, number)
        try:
            compression.load(model, folder)
            step(model, optimizer, 1)
            told.append("")
        except ValueError as error:
            told.append(str(error))
        dist.barrier()
    return told


def nothing():
    """Neither rank has a file: memory begins at zero, and a line says so."""
    model, optimizer = build()
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        compression.load(model, FOLDER / "nowhere")
        step(model, optimizer, 0)
    return "residuals start at zero" in said.getvalue()


def distributed_checkpoint(model):
    """torch.distributed.checkpoint brings every rank its own state into a new model."""
    dcp.save({"memory": compression.Stateful(model)}, checkpoint_id=FOLDER / "dcp")
    other, optimizer = build()
    other.module.load_state_dict(model.module.state_dict())
    dcp.load({"memory": compression.Stateful(other)}, checkpoint_id=FOLDER / "dcp")
    here = torch.optim.SGD(model.parameters(), lr=0.1)
    for number in (END, END + 1):
        step(model, here, number)
        step(other, optimizer, number)
    same = compression.state_dict(model)["checksum"] == compression.state_dict(other)["checksum"]
    return same and digest(model) == digest(other)


def main():
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    attempt = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    model, first = train(dies=attempt == 0)
    report = {"attempt": attempt, "first": first, "resumed": digest(model), "straight": straight(), "zero": nothing()}
    report["told"] = {kind: refusal(kind) for kind in state_damage.TOLD}
    report["dcp"] = distributed_checkpoint(model)
    torch.save(report, FOLDER / f"report{dist.get_rank()}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
