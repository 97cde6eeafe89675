"""Time to target accuracy: real `horovodrun` jobs, one network namespace a rank, on links of 1 Gb/s."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from compression_plugins.errors import CompressionError
from launch.demo import Settings, config_of
from launch.document import COLOURS, Table
from launch.lab import netlab
from launch.lab.jobs import JobError, environment
from launch.results import Result, read_run

RATE = "1gbit"
_LIMIT_S = 240


@dataclass(frozen=True)
class Method:
    """What is put on the command lines of `horovodrun` and of the script."""

    scheme: str
    lr: float = 0.2
    keys: tuple[str, ...] = ()

    @property
    def flags(self) -> list[str]:
        """None for `none`: stock Horovod, with its own fusion and overlap, is the baseline."""
        if self.scheme == "none":
            return []
        changes = [word for key in self.keys for word in ("--compression-set", key)]
        return ["--compression", config_of(self.scheme), *changes]


_OFTEN = ("flush_steps=10",)
METHODS = {
    "none": Method("none"),
    "bf16": Method("bf16"),
    "marsit": Method("marsit", keys=_OFTEN),
    "marsit, ring": Method("marsit", keys=(*_OFTEN, "form=ring")),
    "signsgd": Method("signsgd", keys=("magnitude=0.001",)),
    "ef_signsgd": Method("ef_signsgd", keys=("stages=1",)),
    "ssdm": Method("ssdm", 1e-4),
    "cascading_ssdm": Method("cascading_ssdm", 1e-4),
}
#: As in the other pictures of `marsit-accuracy`.
_COLOUR = dict(
    zip(("none", "marsit, ring", "marsit", "signsgd", "ef_signsgd", "ssdm", "cascading_ssdm", "bf16"), COLOURS)
)
#: The demonstration's network and data.
FULL = Settings(steps=60, evaluate_every=5, target=0.89)
QUICK = Settings(steps=20, width=256, evaluate_every=5, target=0.6)
#: Number of ranks -> methods. A ring of two is no ring, and what does not learn in so few steps is not run twice.
FULL_METHODS = {
    2: tuple(name for name in METHODS if "ring" not in name),
    4: tuple(name for name in METHODS if "ssdm" not in name),
}
QUICK_METHODS = {2: ("none", "marsit")}


def missing() -> str | None:
    """Why there can be no jobs in a network of their own on this machine, as one clause, or None."""
    return netlab.available() or (None if find_spec("horovod") else "Horovod is not installed")


def measure(out: Path, ranks: int, settings: Settings, methods: tuple[str, ...]) -> Iterator[tuple[str, Result]]:
    """Run the methods one after the other.

    Raises:
        CompressionError: the network could not be built or a job failed; the message holds the end of its output.
    """
    try:
        with netlab.NetLab(ranks, RATE) as lab:
            for name in methods:
                folder = out / "runs" / f"{ranks}-{name.replace(', ', '-')}"
                folder.mkdir(parents=True, exist_ok=True)
                for old in folder.iterdir():
                    old.unlink()
                method = METHODS[name]
                script = [sys.executable, "-m", "launch.train", "--batch", str(settings.batch), "--lr", str(method.lr)]
                command = [*script, *settings.script_arguments(folder.resolve(), lab.interface, seed=0)]
                lab.horovod(command, method.flags, environment(), folder / "log.txt").wait(_LIMIT_S)
                yield name, read_run(folder, "horovod", name)
    except (JobError, netlab.NetLabError) as error:
        raise CompressionError(f"netlab of {ranks} hosts: {error}") from None


def table(found: dict[int, dict[str, Result]], target: float, reason: str | None) -> Table:
    """One row a method and number of ranks; without root one row that says so."""
    headers = ["n", "method", "accuracy, %", f"s to {100 * target:g} %", "against none"]
    headers += ["ms a step", "computing", "exposed", "MB sent a step"]
    if reason:
        return Table(headers, [["2, 4", f"not measured: {reason}", *["–"] * 7]], left=2)
    rows = []
    for ranks, results in found.items():
        for name, result in results.items():
            seconds, saved = result.reached(target), saving(results, name, target)
            rows.append(
                [
                    str(ranks),
                    name,
                    f"{100 * result.accuracy:.1f}",
                    f"{seconds:.1f}" if seconds else "not reached",
                    less(saved) if saved is not None and name != "none" else "–",
                    *(f"{1e3 * s:.0f}" for s in (result.step_s, result.compute_s, result.exposed_s)),
                    f"{result.sent_bytes / 1e6:.3g}",
                ]
            )
    return Table(headers, rows, left=2)


def saving(results: dict[str, Result], name: str, target: float) -> float | None:
    """Share of the dense time to target that `name` saves; None where one of them did not get there."""
    dense, mine = results["none"].reached(target), results[name].reached(target)
    return 1 - mine / dense if dense and mine else None


def less(saved: float | None) -> str:
    """A saving (share of the other's, or None) in words: `12 % less`, `3 % more`, `target not reached`."""
    return "target not reached" if saved is None else f"{abs(100 * saved):.0f} % {'more' if saved < 0 else 'less'}"


def draw(axes: Any, results: dict[str, Result], ranks: int, target: float) -> None:
    """Accuracy against training seconds."""
    for name, result in results.items():
        points = result.points
        axes.plot([p.seconds for p in points], [100 * p.accuracy for p in points], color=_COLOUR[name], label=name)
    axes.axhline(100 * target, color="#999999", linewidth=0.8, linestyle=":")
    axes.set(xlabel=f"training time at 1 Gb/s, {ranks} ranks, s", ylabel="test accuracy, %", xlim=(0, None))
    axes.set_ylim(100 * target - 25, 100 * target + 4)
    axes.legend(fontsize=7, loc="lower right")


def notes(settings: Settings, reason: str | None) -> list[str]:
    if reason:
        return [f"Time to target was not measured: {reason}."]
    cores = len(os.sched_getaffinity(0))
    return [
        f"Time to target: MNIST-5k, perceptron of width {settings.width}, {settings.batch} images a rank, "
        f"{settings.steps} steps of SGD (momentum 0.5, cosine decay, learning rate {METHODS['none'].lr:g}, "
        f"{METHODS['ssdm'].lr:g} for both SSDM). The job is short, so Marsit flushes every 10 steps; signsgd moves a "
        "weight by 0.001 times the learning rate. Both were chosen on the same digits. horovodrun, Gloo, one rank a "
        "network namespace, 1 Gb/s each way.",
        f"One run, seed 0: training seconds until two evaluations in a row, every {settings.evaluate_every} steps, are "
        f"at {100 * settings.target:g} %. computing: the same step without communication; exposed: the rest, encoding "
        f"and decoding included. {cores} cores: more ranks than that share them, and every method computes slower, "
        "dense too.",
        "Horovod carries every method: none is refused. Hops of a ring become all-to-alls, each a cycle of its loop.",
    ]
