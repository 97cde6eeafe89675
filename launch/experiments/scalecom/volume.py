"""What a step sends against the number of workers: CLT-k stays, top-k with an all-gather grows, dense is dense.

n = 2, 4, 8: real processes, one network namespace each, torch.distributed over Gloo; counted by the network interface.
n = 2 ... 128: ranks in one process; payload, as a ring would send it. All in bits for each value of the gradient.
Without root there is no interface of one's own to read: that part is left out, and the table says so.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from statistics import mean
from typing import Any

import torch

from compression_plugins.bench.ranks import Ranks
from compression_plugins.config import Config
from launch.document import COLOURS, Table
from launch.lab import netlab

from ..study import Study, drawing
from .volume_worker import RATIO, SCHEMES, bucket, gradient

DESCRIPTION = (
    "ScaleCom: bits sent a step against workers, beside local top-k and dense; payload, and from the interface"
)
#: Values of the gradient: in one process, where memory holds all ranks', and between hosts.
LOCAL, WIRE, WIRE_QUICK = 1 << 18, 1 << 22, 1 << 20
ROOT = Path(__file__).parents[3]
_LIMIT_S = 240


def run(out: Path, quick: bool) -> str:
    """Measure; write records, picture, table and page; return the headline."""
    sizes = [2, 4, 8] if quick else [2, 4, 8, 16, 32, 64, 128]
    hosts = [4] if quick else [2, 4, 8]
    missing = netlab.available()
    if missing:
        print(f"bytes from the interface are not measured: {missing}")
        hosts = []
    with Study("scalecom-volume", out, len(SCHEMES) * (len(sizes) + len(hosts))) as study:
        payload: dict[str, dict[int, float]] = {name: {} for name in SCHEMES}
        places: dict[str, dict[int, float]] = {name: {} for name in SCHEMES}
        interface: dict[str, dict[int, dict[str, float]]] = {name: {} for name in SCHEMES}
        for size in sizes:
            for name in SCHEMES:
                payload[name][size], places[name][size] = simulate(name, size)
                fields = {"payload": payload[name][size], "places": places[name][size]}
                study.record(f"{size} ranks in one process: {name}", part="local", scheme=name, n=size, **fields)
        for size in hosts:
            for name, found in measure(size, WIRE_QUICK if quick else WIRE).items():
                interface[name][size] = found
                study.record(f"{size} hosts: {name}", part="interface", scheme=name, n=size, **found)
        tables = [_payload_table(payload, places), _interface_table(interface, missing)]
        figure = _picture(payload, interface)
        title = "Bits that a rank sends at a step for each value of the gradient"
        return study.finish(title, tables, figure, _notes(missing, quick), _headline(payload, interface))


def simulate(name: str, size: int) -> tuple[float, float]:
    """All ranks in this process: payload bits per value that one sends at a step, and places of the update over k."""
    config = Config.load(SCHEMES[name])
    whole = bucket(config, LOCAL)
    ranks = Ranks(config, size)
    (result,) = ranks.average([whole], [[gradient(LOCAL, rank)] for rank in range(size)])
    return 8 * mean(ranks.sent) / LOCAL, int(torch.count_nonzero(result)) * RATIO / LOCAL


def measure(hosts: int, numel: int) -> dict[str, dict[str, float]]:
    """For every scheme, bits per value and step, the mean over ranks: payload, and sent and received by `eth0`."""
    with netlab.NetLab(hosts, rate=None, pin=False) as lab, tempfile.TemporaryDirectory() as folder:
        results = [Path(folder) / f"{rank}.json" for rank in range(hosts)]
        command = [sys.executable, "-m", "launch.experiments.scalecom.volume_worker"]
        commands = [
            [*command, str(rank), str(hosts), lab.addresses[0], str(numel), str(result)]
            for rank, result in enumerate(results)
        ]
        env = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": lab.interface}
        lab.on_hosts(commands, env, Path(folder) / "log.txt").wait(_LIMIT_S)
        ranks: list[dict[str, dict[str, float]]] = [json.loads(result.read_text()) for result in results]
    return {n: {key: 8 / numel * mean(rank[n][key] for rank in ranks) for key in ranks[0][n]} for n in SCHEMES}


def _payload_table(payload: dict[str, dict[int, float]], places: dict[str, dict[int, float]]) -> Table:
    rows = []
    for size in payload["none"]:
        cells = [f"{payload[name][size]:.3f}" for name in SCHEMES]
        ratio = payload["none"][size] / payload["scalecom"][size]
        rows.append(
            [str(size), *cells, f"{ratio:.1f}×", f"{places['scalecom'][size]:.2f}", f"{places['topk'][size]:.2f}"]
        )
    headers = list(SCHEMES)
    return Table(["n", *headers, "none / scalecom", "places / k, scalecom", "places / k, topk"], rows)


def _interface_table(interface: dict[str, dict[int, dict[str, float]]], missing: str | None) -> Table:
    headers = ["n", "scheme", "payload", "sent by eth0", "received by eth0", "above payload"]
    if missing:
        return Table(headers, [["2, 4, 8", f"not measured: {missing}", "–", "–", "–", "–"]], left=2)
    rows = []
    for size in interface["none"]:
        for name in SCHEMES:
            each = interface[name][size]
            cells = [f"{each[key]:.3f}" for key in ("payload", "sent", "received")]
            rows.append([str(size), name, *cells, f"{100 * (each['sent'] / each['payload'] - 1):+.1f} %"])
    return Table(headers, rows, left=2)


def _picture(payload: dict[str, dict[int, float]], interface: dict[str, dict[int, dict[str, float]]]) -> Any:
    figure, (axes,) = drawing(width=7.5, height=4.6)
    for name, colour in zip(SCHEMES, COLOURS):
        line = payload[name]
        axes.plot(line.keys(), line.values(), color=colour, label=name)
        points = interface[name]
        axes.plot(points.keys(), [p["sent"] for p in points.values()], "o", color=colour, fillstyle="none")
    axes.plot([], [], "o", color="black", fillstyle="none", label="from the interface")
    sizes = list(payload["none"])
    axes.set(xscale="log", yscale="log", xlabel="workers", ylabel="bits sent a step and rank, for each value")
    axes.set_xticks(sizes, [str(size) for size in sizes])
    axes.minorticks_off()
    axes.legend(fontsize=8)
    return figure


def _notes(missing: str | None, quick: bool) -> list[str]:
    wire = WIRE_QUICK if quick else WIRE
    notes = [
        f"One value in {RATIO} is kept. Sizes do not depend on the values, which are Gaussian, half of the variance "
        "shared by all ranks. Means over ranks; in a ring a rank receives as much as it sends.",
        "places / k: coordinates that the update changes. Top-k's grow with n: the build-up of the paper.",
    ]
    if missing:
        return [*notes, f"Bytes from the interface were not measured: {missing}."]
    return [
        *notes,
        f"eth0: a bucket of {4 * wire / 1e6:.1f} MB, n steps, so that each rank leads once. It counts headers, "
        "acknowledgements and Gloo's own messages, which are many for the little that ScaleCom sends; on a veth pair a "
        "segment of up to 64 KB has one header.",
    ]


def _headline(payload: dict[str, dict[int, float]], interface: dict[str, dict[int, dict[str, float]]]) -> str:
    first, last = min(payload["none"]), max(payload["none"])

    def way(name: str) -> str:
        return f"{name} {payload[name][first]:.3g} -> {payload[name][last]:.3g}"

    text = (
        f"bits sent a step and value, n = {first} -> {last}: {way('scalecom')}, {way('topk')}, dense {way('none')[5:]}"
    )
    points = [each for found in interface.values() for each in found.values()]
    if not points:
        return f"{text}; interface not measured"
    worst = max(abs(each["sent"] / each["payload"] - 1) for each in points)
    return f"{text}; eth0 within {100 * worst:.1f} % of it at n = {', '.join(map(str, interface['none']))}"
