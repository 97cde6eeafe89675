"""What `advise` prints and writes."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import yaml

from .._version import __version__
from ..bench.timing import machine as machine_facts
from ..errors import ConfigError
from .choose import Choice, Row, reasons, table
from .compute import Compute
from .network import Given, Measured
from .predict import Step
from .simulate import Host, Machine


@dataclass(frozen=True)
class Facts:
    """What the predictions were made of.

    Attributes:
        scale: seconds of a codec on the device of the job, for a second on this one.
        model: name of the shapes, or module and function.
        optimizer: `sgd` or `adam`, for what is like them.
    """

    network: Given | Measured
    compute: Compute
    host: Host
    device: str
    machine: Machine
    scale: float
    model: str
    optimizer: str = "adam"


def text(
    facts: Facts,
    rows: Sequence[Row],
    choice: Choice,
    at: Callable[[Row, Given | Measured], Step],
    margin: float,
) -> str:
    """The whole report but its last line, the recommendation."""
    compute = facts.compute
    lines = [
        *facts.network.describe(),
        f"model: {facts.model}, {len(compute.specs)} tensors, {compute.numel / 1e6:.4g} M values; {compute.note}",
        f"codecs: timed on this {facts.device}" + _scaled(facts),
        f"host: {facts.host}; optimizer: {facts.optimizer} (--optimizer)",
        "",
        table(rows, choice),
        "",
        reasons(choice, facts.network, at, margin),
    ]
    if choice.row.label != "none":
        document = {key: value for key, value in choice.row.config.to_dict().items() if value != []}
        lines += ["", "# the configuration", yaml.safe_dump(document, sort_keys=False).rstrip()]
    return "\n".join(lines)


def _scaled(facts: Facts) -> str:
    if facts.scale == 1.0:
        return ""
    return (
        f", scaled by its copy rate of {facts.machine.copy_rate * facts.scale / 1e9:.3g} GB/s to a device of "
        f"{facts.machine.copy_rate / 1e9:.4g} GB/s; calls cost what they cost here"
    )


def write_json(path: str, facts: Facts, rows: Sequence[Row], choice: Choice) -> None:
    """One object a scheme; replaces the file."""
    compute = facts.compute
    about = {
        "kind": "prediction",
        "version": __version__,
        **machine_facts(torch.device(facts.device)),
        "host": facts.host,
        "ranks": facts.network.size,
        "network": facts.network.to_dict(),
        "model": facts.model,
        "numel": compute.numel,
        "forward_s": compute.forward_s,
        "backward_s": compute.backward_s,
        "update_s": compute.update_s,
        "copy_rate": facts.machine.copy_rate,
        "steal": facts.machine.steal,
        "codec_scale": facts.scale,
    }
    records = [
        {
            **about,
            "scheme": row.config.scheme.name,
            "label": row.label,
            "config": row.config.to_dict(),
            "recommended": row is choice.row,
            "eligible": row.eligible,
            "error": row.error,
            "note": row.note,
            **(asdict(row.step) if row.step is not None else {}),
        }
        for row in rows
    ]
    try:
        Path(path).write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror}") from None
