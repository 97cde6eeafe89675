"""The demonstration: one network, one data set, every scheme, on links of 1 Gb/s.

    python -m launch.demo                      six schemes under Horovod, two under DeepSpeed; a few minutes
    python -m launch.demo --quick              a small network and few steps: shows that everything works
    python -m launch.demo --schemes none topk --rate 100mbit

The training scripts (`launch/train.py`, `launch/train_deepspeed.py`) know nothing of compression; a scheme is a flag
of `horovodrun` or a block of DeepSpeed's config. As root with iproute2 each rank is a host of its own, see
`launch/lab/netlab.py`; otherwise the ranks share this machine's loopback, and the report says so.
"""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from launch.document import Machine
from launch.lab.jobs import ROOT, Job, JobError, Loopback, environment, free_port
from launch.lab.netlab import NetLab, available
from launch.report import Report
from launch.results import Result, read_records, read_run

CONFIGS = ROOT / "configs" / "demo"
SCHEMES = ("none", "bf16", "powersgd", "scalecom", "marsit", "double_quantization")
DEEPSPEED_SCHEMES = ("none", "scalecom")


@dataclass(frozen=True)
class Settings:
    """What all runs of a demonstration share."""

    ranks: int = 2
    steps: int = 120
    width: int = 2048
    evaluate_every: int = 10
    batch: int = 32
    seeds: int = 1
    target: float = 0.9

    def script_arguments(self, record: Path, interface: str, seed: int) -> list[str]:
        return [
            *("--steps", str(self.steps), "--width", str(self.width), "--evaluate-every", str(self.evaluate_every)),
            *("--record", str(record), "--interface", interface, "--seed", str(seed)),
        ]

    def job(self) -> str:
        parameters = 784 * self.width + self.width * self.width + 10 * self.width + 2 * self.width + 10
        return (
            f"MNIST-5k, perceptron of {parameters / 1e6:.1f} M parameters, {self.ranks} ranks × {self.batch} images, "
            f"{self.steps} steps of SGD, same settings for every scheme; seeds: {self.seeds}"
        )


QUICK = Settings(steps=20, width=256, evaluate_every=5, target=0.6)


def config_of(scheme: str) -> str:
    """The scheme's short-job YAML where there is one, else its name (its defaults)."""
    path = CONFIGS / f"{scheme}.yaml"
    return str(path) if path.exists() else scheme


def start_horovod(lab: NetLab | Loopback, scheme: str, settings: Settings, folder: Path, seed: int) -> Job:
    """`none` is stock Horovod, without our flag: its own fusion and overlap are the baseline."""
    flags = [] if scheme == "none" else ["--compression", config_of(scheme)]
    script = [sys.executable, "-m", "launch.train", "--batch", str(settings.batch)]
    arguments = settings.script_arguments(folder, lab.interface, seed)
    return lab.horovod([*script, *arguments], flags, environment(), folder / "log.txt")


def start_deepspeed(lab: NetLab | Loopback, scheme: str, settings: Settings, folder: Path, seed: int) -> Job:
    """The same YAML file as under Horovod, named by the config's block; `none` is stock DeepSpeed without the block."""
    config: dict[str, object] = {
        "train_micro_batch_size_per_gpu": settings.batch,
        "zero_optimization": {"stage": 0},
        "gradient_clipping": 0.0,  # DeepSpeed clips at 1.0 by default, Horovod not at all
    }
    if scheme != "none":
        source = config_of(scheme)
        config["communication_compression"] = {"file": source} if Path(source).exists() else {"scheme": scheme}
    path = folder / "ds_config.json"
    path.write_text(json.dumps(config, indent=2))
    command = ["--module", "launch.train_deepspeed", "--deepspeed_config", str(path)]
    arguments = settings.script_arguments(folder, lab.interface, seed)
    return lab.deepspeed([*command, *arguments], free_port(), environment(), folder / "log.txt")


def follow(job: Job, folder: Path, label: str, settings: Settings, console: Console, limit_s: float) -> None:
    """Shows the run's progress from what rank 0 has recorded, until it ends.

    Raises:
        JobError: the job failed or ran past `limit_s` seconds.
    """
    bar = Progress(
        TextColumn(f"{label:<32}"),
        BarColumn(30),
        MofNCompleteColumn(),
        TextColumn("{task.fields[state]}"),
        TimeElapsedColumn(),
        console=console,
    )
    begin = time.monotonic()
    with bar:
        task = bar.add_task(label, total=settings.steps, state="starting")
        while True:
            running = job.poll()
            records = read_records(folder / "rank0.jsonl")
            done = sum(r["kind"] == "step" for r in records)
            accuracy = [r["accuracy"] for r in records if r["kind"] == "evaluation"]
            state = f"{100 * accuracy[-1]:5.1f} %" if accuracy else "starting"
            bar.update(task, completed=done, state=state)
            if not running:
                return
            if time.monotonic() - begin > limit_s:
                job.kill()
                raise JobError(f"{label} ran past {limit_s:g} s\n{job.tail()}")
            time.sleep(0.3)


def run_all(
    lab: NetLab | Loopback, runs: Sequence[tuple[str, str]], settings: Settings, out: Path, console: Console
) -> list[Result]:
    """Runs each (host framework, scheme) in turn and reads what it measured."""
    results = []
    for seed, (host, scheme) in product(range(settings.seeds), runs):
        folder = out / "runs" / f"{host}-{scheme}-{seed}"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        job = (start_horovod if host == "horovod" else start_deepspeed)(lab, scheme, settings, folder, seed)
        try:
            label = f"{host}: {scheme}" + (f", seed {seed}" if settings.seeds > 1 else "")
            follow(job, folder, label, settings, console, limit_s=300)
        finally:
            job.kill()
        results.append(read_run(folder, host, scheme, seed))
    return results


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small network, few steps, `none` and `scalecom` only")
    parser.add_argument("--rate", default="1gbit", help="rate of every link, each way, in tc's syntax (default 1gbit)")
    parser.add_argument("--loopback", action="store_true", help="no namespaces even where they are possible")
    parser.add_argument("--schemes", nargs="+", help="schemes to run under Horovod")
    parser.add_argument("--deepspeed", nargs="*", metavar="SCHEME", help="schemes to run under DeepSpeed")
    parser.add_argument("--ranks", type=int, help="number of ranks (default 2)")
    parser.add_argument("--steps", type=int, help="training steps per run")
    parser.add_argument("--seeds", type=int, help="runs of everything, each with other weights and data order")
    parser.add_argument("--publish", action="store_true", help="also write docs/demo.* and the README's table")
    parser.add_argument("--out", type=Path, default=Path("out/demo"), help="folder of the report (default out/demo)")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = arguments(argv)
    console = Console()
    base = QUICK if args.quick else Settings()
    overrides = {
        name: value for name, value in (("ranks", args.ranks), ("steps", args.steps), ("seeds", args.seeds)) if value
    }
    settings = Settings(**{**base.__dict__, **overrides})
    schemes = args.schemes or (["none", "scalecom"] if args.quick else SCHEMES)
    deepspeed = args.deepspeed if args.deepspeed is not None else ([] if args.quick else DEEPSPEED_SCHEMES)
    runs = [("horovod", s) for s in schemes] + [("deepspeed", s) for s in deepspeed]

    reason = "asked for" if args.loopback else available()
    lab: NetLab | Loopback = Loopback(settings.ranks) if reason else NetLab(settings.ranks, args.rate)
    if reason:
        console.print(
            f"Loopback ({reason}): all ranks share this machine's memory bus, so compression saves bytes but hardly "
            "time. Bytes are counted on `lo` for all ranks together and divided by their number."
        )
    args.out.mkdir(parents=True, exist_ok=True)
    try:
        with lab:
            console.print(f"{settings.job()}\n{lab.description}")
            results = run_all(lab, runs, settings, args.out.resolve(), console)
    except (JobError, FileNotFoundError) as error:
        console.print(str(error), style="red", markup=False)
        return 1
    except KeyboardInterrupt:
        console.print("interrupted: jobs ended, network removed")
        return 130
    report = Report(results, str(Machine.here()), lab.description, settings.target, settings.job())
    saved = {**report.__dict__, "results": [r.to_dict() for r in results]}
    (args.out / "results.json").write_text(json.dumps(saved, indent=1))
    report.write(args.out)
    if args.publish:
        report.publish(ROOT)
    console.print(f"\n{report.table().text()}\n\n{report.machine}\n", markup=False, soft_wrap=True, highlight=False)
    console.print(f"{args.out}/demo.html  demo.png  demo.md  results.json", markup=False, highlight=False)
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends jobs and network as Ctrl-C does
    sys.exit(main())
