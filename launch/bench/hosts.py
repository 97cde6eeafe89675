"""Starts a cell's job as its user would: `horovodrun`, `deepspeed` or `torchrun`, with stock command lines."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from compression_plugins.config import ENVIRONMENT_VARIABLE
from compression_plugins.engine.telemetry import ENVIRONMENT_VARIABLE as TELEMETRY
from launch.lab import netlab
from launch.lab.jobs import Job, Loopback, environment, free_port, tool
from launch.lab.netlab import NetLab

from .cells import Cell
from .settings import UNLIMITED, Choice

Lab = NetLab | Loopback


def laboratory(ranks: int, rate: str) -> Lab:
    """A network of its own for every rank; without root, loopback for an unlimited rate.

    Raises:
        netlab.NetLabError: a limited rate, where no network can be emulated.
    """
    reason = netlab.available()
    if reason is None:
        return NetLab(ranks, None if rate == UNLIMITED else rate)
    if rate == UNLIMITED:
        return Loopback(ranks)
    raise netlab.NetLabError(f"no links of {rate} here: {reason}; `rates: [{UNLIMITED}]` needs none")


def start(lab: Lab, cell: Cell, choice: Choice, folder: Path, batch: int) -> Job:
    """The job of a speed or accuracy cell, which records into `folder`.

    Args:
        batch: samples per rank and step, which DeepSpeed's config wants to know.
    """
    worker = "ddp" if cell.host == "torchrun" else cell.host
    script = ["-m", f"launch.bench.worker_{worker}", *_arguments(cell, choice, folder, lab.interface)]
    log, variables = folder / "log.txt", {**environment(), TELEMETRY: str(folder / "telemetry.jsonl")}
    if cell.host == "horovod":
        flags = ["--compression", choice.source] if choice.source else []
        return lab.horovod([sys.executable, *script], flags, variables, log)
    if cell.host == "deepspeed":
        config = folder / "ds_config.json"
        config.write_text(json.dumps(_deepspeed_config(choice, batch), indent=2))
        command = ["--module", *script[1:], "--deepspeed_config", str(config)]
        return lab.deepspeed(command, free_port(), variables, log)
    if choice.config is not None:
        variables |= {ENVIRONMENT_VARIABLE: json.dumps(choice.config), "COMPRESSION_PLUGINS_HOST": "ddp"}
    return torchrun(lab, ["--module", *script[1:]], variables, log)


def _arguments(cell: Cell, choice: Choice, folder: Path, interface: str) -> list[str]:
    found = ["--model", cell.model, "--steps", str(cell.warmup_steps + cell.steps), "--seed", str(cell.seed)]
    found += ["--evaluate-every", str(cell.evaluate_every), "--record", str(folder), "--interface", interface]
    if choice.peer:
        found += ["--peer", choice.label.partition("/")[2]]
    if cell.compute_ms is not None:
        found += ["--compute-ms", str(cell.compute_ms)]
    return found


def _deepspeed_config(choice: Choice, batch: int) -> dict[str, object]:
    config: dict[str, object] = {
        "train_micro_batch_size_per_gpu": batch,
        "zero_optimization": {"stage": 0},
        "gradient_clipping": 0.0,  # DeepSpeed clips at 1.0 by default, the other hosts not at all
    }
    if choice.source:
        config["communication_compression"] = {"file": choice.source} if "/" in choice.source else choice.config
    return config


def torchrun(lab: Lab, command: Sequence[str], variables: Mapping[str, str], log: Path) -> Job:
    """A job of torchrun, one rank on each host of `lab`."""
    launcher = [tool("torchrun"), "--nnodes", str(lab.hosts if isinstance(lab, NetLab) else 1)]
    if isinstance(lab, Loopback):
        local = ["--nproc_per_node", str(lab.hosts), "--master_addr", "127.0.0.1", "--master_port", str(free_port())]
        return Job([[*launcher, *local, *command]], dict(variables), log)
    where = ["--master_addr", lab.addresses[0], "--master_port", "29500"]
    commands = [
        [*launcher, "--nproc_per_node", "1", "--node_rank", str(rank), *where, *command] for rank in range(lab.hosts)
    ]
    return lab.on_hosts(commands, {"GLOO_SOCKET_IFNAME": lab.interface, **variables}, log)
