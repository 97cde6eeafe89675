"""From what the ranks of one job recorded to the figures of its row."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import mean, median, quantiles
from typing import Any

from compression_plugins.engine.telemetry import PHASES
from launch.results import read_records

from .cells import Cell


def read(folder: Path, cell: Cell) -> dict[str, Any]:
    """Times in seconds and sizes in bytes, a step; of rank 0 where not said otherwise; warm-up steps left out.

    step_s, step_quartiles_s: median and quartiles of a step's time; where ranks meet every so many steps only, of the
        mean step of whole rounds.
    compute_s: median time of the same step without communication.
    sent_bytes, typical_bytes: by one rank over its interface, headers included, mean over ranks; mean and median over
        steps.
    payload_bytes, ratio, state_bytes, encode_s, decode_s, wire_s, exposed_s: what the reducer counted, medians; left
        out for stock hosts and peers, where there is no reducer (state_bytes where a peer tells it).
    numel: of the model's parameters.
    points: [step, metric] of the evaluations; metric: the last of them.

    Raises:
        ValueError: a rank's file is missing or the rank did not come to its end.
    """
    ranks = [read_records(path) for path in sorted(folder.glob("rank*.jsonl"))]
    if len(ranks) != cell.ranks or any(not records or records[-1]["kind"] != "end" for records in ranks):
        raise ValueError(f"{folder} does not hold a finished run of {cell.ranks} ranks")
    # On loopback all ranks read one counter, so each of them sees what all have sent.
    share = len(ranks) if ranks[0][0]["interface"] == "lo" else 1
    steps = [[r for r in records if r["kind"] == "step"][cell.warmup_steps :] for records in ranks]
    if any(len(each) != cell.steps for each in steps):
        raise ValueError(f"{folder}: {[len(each) for each in steps]} steps a rank instead of {cell.steps}")
    if cell.steps < cell.round_steps:
        raise ValueError(f"{cell.steps} steps hold no whole round of {cell.round_steps}: time more")
    sent = [mean(rank[i]["sent_bytes"] for rank in steps) / share for i in range(cell.steps)]
    times = _by_round([record["seconds"] for record in steps[0]], cell.round_steps)
    points = [[r["step"], r["accuracy"]] for r in ranks[0] if r["kind"] == "evaluation"]
    return {
        **json.loads((folder / "about.json").read_text()),
        **_telemetry(folder / "telemetry.jsonl", cell.warmup_steps, cell.round_steps),
        "step_s": median(times),
        "step_quartiles_s": [quantiles(times)[0], quantiles(times)[2]] if len(times) > 1 else times * 2,
        "compute_s": median(r["seconds"] for r in ranks[0] if r["kind"] == "compute"),
        "sent_bytes": mean(sent),
        "typical_bytes": median(_by_round(sent, cell.round_steps)),
        **({"points": points, "metric": points[-1][1]} if points else {}),
    }


def _by_round(values: list[float], steps: int) -> list[float]:
    """The means of as many whole rounds as there are; all values where a round is one step."""
    return [mean(values[i : i + steps]) for i in range(0, len(values) - steps + 1, steps)]


def _telemetry(path: Path, warmup: int, steps: int) -> dict[str, float]:
    records = read_records(path)[warmup:]
    if not records:
        return {}
    names = {"payload_bytes": "sent_bytes", "ratio": "ratio", "state_bytes": "state_bytes"}
    names |= {f"{phase}_s": f"{phase}_s" for phase in PHASES}
    known = {new: [r[old] for r in records if r[old] is not None] for new, old in names.items()}
    rounds = {name: _by_round(values, steps) for name, values in known.items()}
    return {name: median(values) for name, values in rounds.items() if values}


def steps_to(points: list[list[float]], target: float, better: int) -> int | None:
    """Steps until two evaluations in a row are at `target` or better; None if that never happens.

    Args:
        better: 1 where more is better, -1 where less is.
    """
    for (step, first), (_, second) in zip(points, points[1:]):
        if min(better * first, better * second) >= better * target:
            return int(step)
    return None
