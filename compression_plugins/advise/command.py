"""`compression-plugins advise`: whether to compress this job's gradients, and with what, before it starts."""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError, UnsupportedError

if TYPE_CHECKING:
    from ..config import Config
    from .choose import Row
    from .compute import Compute
    from .network import Given, Measured
    from .simulate import Host, Machine
    from .work import Codecs

#: TFLOP/s, sustained, and bytes per second, read plus written, of an accelerator of which nothing is said.
_TFLOPS, _MEMORY_BANDWIDTH = 100.0, 2e12
#: Of `--shapes`, those that are trained with SGD.
_IMAGES = ("mlp", "resnet50")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `advise` on `parser`."""
    network = parser.add_argument_group(
        "network", "measured inside a job (horovodrun, deepspeed, torchrun); else given"
    )
    network.add_argument("--ranks", type=int, metavar="N", help="number of ranks")
    network.add_argument("--bandwidth", metavar="RATE", help="of a node's link, each way, in bits: 25Gb, 100mbit")
    network.add_argument("--latency", metavar="TIME", help="of a message (default 20us)")
    network.add_argument("--ranks-per-node", type=int, metavar="N", help="ranks that share a link (default 1)")
    network.add_argument("--node-bandwidth", metavar="RATE", help="between ranks of a node (default unlimited)")
    network.add_argument(
        "--topology",
        choices=("flat", "hierarchical", "two-stage"),
        help="how collectives are built (default hierarchical where nodes have ranks to share a link, else flat)",
    )
    model = parser.add_argument_group("model")
    which = model.add_mutually_exclusive_group(required=True)
    which.add_argument("--model", metavar="MODULE:FUNCTION", help="returns (model, the batch of one worker)")
    which.add_argument("--shapes", metavar="NAME|FILE", help="bert-large, gpt2, mlp, resnet50, or YAML `name: [sides]`")
    model.add_argument("--compute-ms", type=float, metavar="MS", help="a step without communication, for --shapes")
    model.add_argument("--tflops", type=float, help="sustained TFLOP/s of a rank, for --shapes (default 100)")
    model.add_argument("--batch", type=int, help="samples of a rank and step, for --shapes")
    model.add_argument(
        "--optimizer",
        choices=("sgd", "adam"),
        help="of the job, or one like it: AdamW is adam (default sgd for --shapes mlp and resnet50, else adam)",
    )
    device = parser.add_argument_group("device")
    device.add_argument("--device", help="where model and codecs are timed (default cuda if there is one, else cpu)")
    device.add_argument(
        "--memory-bandwidth",
        metavar="RATE",
        help="of the device of the job, in bytes: 2TB; scales the codecs timed here",
    )
    chosen = parser.add_argument_group("schemes")
    chosen.add_argument(
        "--schemes", nargs="+", metavar="NAME", help="candidates (default all, and presets); none, bf16 always are"
    )
    chosen.add_argument("--config", action="append", default=[], metavar="FILE", help="one more candidate; repeatable")
    chosen.add_argument("--margin", type=float, default=5.0, metavar="%", help="by which a compressor must win (5)")
    parser.add_argument(
        "--framework", choices=("horovod", "ddp", "deepspeed"), help="of the job (default: its launcher's)"
    )
    parser.add_argument("--json", metavar="FILE", help="write one JSON line a scheme")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # DeepSpeed's launcher adds it


def run(options: argparse.Namespace) -> int:
    """Measure, predict, print; returns 0. Only rank 0 of a job prints.

    Raises:
        ConfigError: an option, a shape file or a model that cannot be used.
        UnsupportedError: the host framework or device is not there.
    """
    _check(options)
    from . import measure

    candidates = _candidates(options)  # checked before anything is measured
    launcher = None if options.ranks is not None else measure.in_job()
    device = _device(options.device, launcher)
    if launcher is None:
        return _advise(options, candidates, _given(options), device, True)
    transport = measure.connect(launcher, device)
    try:
        network = measure.measure(transport, device, f"{launcher} on {device.partition(':')[0]}")
        return _advise(options, candidates, network, device, transport.rank == 0, transport)
    finally:
        measure.disconnect(launcher)


def _advise(
    options: argparse.Namespace,
    candidates: dict[str, Config],
    network: Given | Measured,
    device: str,
    speaks: bool,
    transport: Any = None,
) -> int:
    from ..engine.plan import make_plan
    from . import measure, report
    from .accuracy import update_error
    from .choose import BASELINES, Row, choose
    from .work import Codecs

    compute, scale_to = _compute(options, device, transport)
    machine, scale = _machine(device, scale_to, options.model is not None)
    plans = [make_plan(config, compute.specs) for config in candidates.values()]
    largest = max((bucket.numel for plan in plans for bucket in plan.buckets), default=1)
    codecs = Codecs(device, largest, scale)
    host: Host = options.framework or (measure.in_job() if transport is not None else None) or "horovod"

    def at(row: Row, on: Given | Measured) -> Any:
        return _step(row.config, row.label, compute, on, codecs, host, machine)

    optimizer = options.optimizer or ("sgd" if options.shapes in _IMAGES else "adam")
    rows = []
    for label, config in candidates.items():
        try:
            if config.levels is not None:
                raise UnsupportedError("levels: two levels are not predicted")
            config.check_ranks(network.size)
        except UnsupportedError as error:
            rows.append(Row(label, config, None, note=str(error)))
            continue
        distance = update_error(config.scheme)
        row = Row(label, config, None, distance, _note(config, distance), adaptive=optimizer == "adam")
        if row.misses:
            row = replace(row, note="not with adam: misses the loss of dense training")
        rows.append(replace(row, step=at(row, network)))
    if not speaks:
        return 0
    assert all(name in candidates for name in BASELINES)
    choice = choose(rows, options.margin / 100)
    facts = report.Facts(network, compute, host, device, machine, scale, options.shapes or options.model, optimizer)
    print(report.text(facts, rows, choice, at, options.margin / 100))
    if options.json:
        report.write_json(options.json, facts, rows, choice)
    print(choice.line(), flush=True)
    return 0


def _step(
    config: Config, label: str, compute: Compute, network: Any, codecs: Codecs, host: Any, machine: Machine
) -> Any:
    from .predict import step

    chosen = None if label == "none" else config
    return step(chosen, compute, network, codecs.on(network.size), host, machine, codecs.model_side)


def _check(options: argparse.Namespace) -> None:
    """Options that contradict each other, or have values that mean nothing."""
    link = ("bandwidth", "latency", "ranks_per_node", "node_bandwidth", "topology")
    given = [name for name in link if _is(options, name)]
    if options.ranks is None and given:
        raise ConfigError(f"--{given[0].replace('_', '-')} describes a network for --ranks N, which is missing")
    if options.ranks is not None and options.bandwidth is None:
        raise ConfigError("--ranks needs the --bandwidth of their links, for example --bandwidth 25Gb")
    if options.model is not None:
        for name in ("compute_ms", "tflops", "batch"):
            if _is(options, name):
                raise ConfigError(f"--{name.replace('_', '-')} is for --shapes; --model is timed")
    if options.compute_ms is not None and _is(options, "tflops"):
        raise ConfigError("--compute-ms says what --tflops would estimate; give one of them")
    for name in ("ranks", "compute_ms", "tflops", "batch", "ranks_per_node"):
        if _is(options, name) and getattr(options, name) <= 0:
            raise ConfigError(f"--{name.replace('_', '-')} {getattr(options, name)}: it is above 0")
    if options.margin < 0:
        raise ConfigError(f"--margin {options.margin:g}: it is 0 or more")


def _is(options: argparse.Namespace, name: str) -> bool:
    return getattr(options, name) is not None


def _candidates(options: argparse.Namespace) -> dict[str, Config]:
    from ..config import Config, presets
    from ..schemes import registry

    names = options.schemes or [*registry.names(), *presets()]
    found = {name: Config.load(name) for name in dict.fromkeys(["none", "bf16", *names])}
    for path in options.config:
        if path in found:
            raise ConfigError(f"--config {path}: that is the name of a scheme, which --schemes takes")
        found[path] = Config.load(path)
    return found


def _given(options: argparse.Namespace) -> Given:
    from .network import Given, parse_rate, parse_time

    if options.ranks is None:
        raise ConfigError(
            "advise: which network? run it inside a job (horovodrun -np 4 compression-plugins advise ...), "
            "or describe one: --ranks 64 --bandwidth 25Gb"
        )
    per_node = options.ranks_per_node or 1
    return Given(
        options.ranks,
        parse_rate(options.bandwidth),
        parse_time(options.latency or "20us"),
        per_node,
        parse_rate(options.node_bandwidth) if options.node_bandwidth else float("inf"),
        options.topology or ("hierarchical" if per_node > 1 else "flat"),
    )


def _device(name: str | None, launcher: str | None) -> str:
    import os

    import torch

    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        kind = torch.device(name).type
    except RuntimeError:
        raise ConfigError(f"--device {name!r} is no device; write cpu or cuda") from None
    if kind not in ("cpu", "cuda"):
        raise ConfigError(f"--device {name!r}: codecs run on cpu and cuda")
    if kind == "cuda":
        if not torch.cuda.is_available():
            raise UnsupportedError("--device cuda: this machine has no CUDA device; write --device cpu")
        local = os.environ.get("HOROVOD_LOCAL_RANK" if launcher == "horovod" else "LOCAL_RANK")
        if launcher is not None and local is not None:
            name = f"cuda:{local}"
        torch.cuda.set_device(torch.device(name))
    return name


def _compute(options: argparse.Namespace, device: str, transport: Any) -> tuple[Compute, float | None]:
    """The computation, and the memory bandwidth of the device that does it, where that is not this one."""
    from . import compute, shapes
    from .network import parse_bytes_rate

    bandwidth = parse_bytes_rate(options.memory_bandwidth) if options.memory_bandwidth else None
    if options.model is not None:
        import os
        import sys

        from .layer_ratios import load_example

        sys.path.insert(0, os.getcwd())  # as for `python -m`
        try:
            model, example = load_example(options.model)
        except ConfigError as error:
            raise ConfigError(str(error).replace("rates", "--model", 1)) from None
        result = compute.from_model(model, example, device)
        return (result if transport is None else compute.slowest(result, transport)), bandwidth
    network = shapes.load(options.shapes)
    tflops, batch = options.tflops, options.batch or network.batch
    if options.compute_ms is None and tflops is None and network.flops is not None:
        tflops, bandwidth = _TFLOPS, bandwidth or _MEMORY_BANDWIDTH
    return compute.from_shapes(network, options.compute_ms, tflops, batch), bandwidth


def _machine(device: str, bandwidth: float | None, computes: bool) -> tuple[Machine, float]:
    """The machine of the job, and seconds of a codec there for a second here.

    `computes`: the model was timed on this device, so that it shares its cores with communication.
    """
    import os

    import torch

    from ..bench.timing import copy_rate
    from .simulate import Machine

    here = copy_rate(1 << 22, torch.device(device), 7)
    if bandwidth is not None:
        return Machine(bandwidth), here / bandwidth
    if torch.device(device).type == "cuda":
        return Machine(here), 1.0
    local = int(os.environ.get("HOROVOD_LOCAL_SIZE") or os.environ.get("LOCAL_WORLD_SIZE") or 1)
    cores = len(os.sched_getaffinity(0)) / local
    return Machine(here, min(1.0, max(0.0, torch.get_num_threads() + 1 - cores)), computes), 1.0


def _note(config: Config, error: float) -> str:
    from .accuracy import LIMIT

    if config.scheme.name == "fake":
        return "bound of any gain, no method"
    if error > LIMIT:
        return "not recommended: needs settings of its own"
    return "error feedback" if config.scheme.memory else ""
