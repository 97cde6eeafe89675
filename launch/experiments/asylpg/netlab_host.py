"""One host of `asylpg-netlab`: the server or a worker, all methods one after the other, a line of JSON each."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import TensorDataset

from compression_plugins.parameter_server.client import run_worker
from compression_plugins.parameter_server.options import Options
from compression_plugins.parameter_server.problem import Problem
from compression_plugins.parameter_server.records import Epoch
from compression_plugins.parameter_server.server import Server
from compression_plugins.parameter_server.service import Service
from compression_plugins.parameter_server.simulate import Simulation
from compression_plugins.parameter_server.worker import Worker
from launch.task import load_digits

INTERFACE = "eth0"
PORT = 29600
PATIENCE_S = 60.0


def problem(seed: int) -> Problem:
    """784-128-64-10 with ReLU (109,386 weights, drawn from `seed`) on all 5,000 digits, pixels in [0, 1]."""
    train, test = load_digits()
    pixels = torch.cat((train.images, test.images)) * 0.3081 + 0.1307
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10))
    data = TensorDataset(pixels, torch.cat((train.labels, test.labels)))
    return Problem(model, nn.functional.cross_entropy, data)


def warm_up(task: Problem, methods: Sequence[str]) -> None:
    """Three updates of every method in this process: Numba loads or compiles a kernel at its first call."""
    for method in methods:
        options = Options.load({"method": method, "workers": 1, "inner_steps": 3, "epochs": 1, "lr": 1e-3})
        Simulation(Server(options, task.start(), task.samples), [Worker(0, options, task)]).run()


def interface_bytes() -> int:
    """Sent and received by this host so far, headers of all layers included, by the kernel's counters."""
    folder = Path("/sys/class/net") / INTERFACE / "statistics"
    return sum(int((folder / f"{way}_bytes").read_text()) for way in ("tx", "rx"))


def serve(task: Problem, options: Options, address: tuple[str, int], token: bytes) -> dict[str, Any]:
    """Run one method; `rows` are (seconds since the first snapshot was asked for, updates, bits, loss)."""
    rows: list[tuple[float, int, int, float]] = []
    ends: list[float] = []

    def elapsed() -> float:
        return time.monotonic() - (service.began or 0.0)

    def note(row: Epoch) -> None:
        rows.append((elapsed(), row.step, row.bits, row.loss))

    before = interface_bytes()
    server = Server(options, task.start(), task.samples, note, on_checkpoint=lambda _: ends.append(elapsed()))
    service = Service(server, token, *address)
    service.run()
    return {
        "seconds": ends[-1],
        "rows": rows,
        "bits": server.traffic.bits,
        "wire_bytes": server.traffic.wire_bytes,
        "interface_bytes": interface_bytes() - before,
        "largest_delay": server.largest_delay,
        "server": asdict(server.seconds),
    }


def work(task: Problem, options: Options, rank: int, address: tuple[str, int], token: bytes) -> Mapping[str, Any]:
    """Work for one method; where the time went."""
    worker = Worker(rank, options, task)
    run_worker(worker, address, token, reconnect_s=PATIENCE_S)
    return asdict(worker.seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rank", type=int, help="of this worker; the server has none")
    parser.add_argument("--address", required=True, help="of the server")
    parser.add_argument("--token", type=Path, required=True, help="file with the shared secret")
    parser.add_argument("--settings", type=json.loads, required=True, help="options, as JSON")
    parser.add_argument("--methods", nargs="+", required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    torch.set_num_threads(1)
    token, task = args.token.read_bytes(), problem(args.settings["seed"])
    warm_up(task, args.methods)
    with args.out.open("w", encoding="utf-8") as out:
        for number, method in enumerate(args.methods):
            options = Options.load({**args.settings, "method": method, "start_s": PATIENCE_S})
            address = (args.address, PORT + number)  # a port each: nobody meets the server of the method before
            if args.rank is None:
                record: Mapping[str, Any] = serve(task, options, address, token)
            else:
                record = work(task, options, args.rank, address, token)
            out.write(json.dumps({"method": method, **record}) + "\n")


if __name__ == "__main__":
    main()
