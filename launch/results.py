"""From the ranks' JSON lines to the figures of one run."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import mean, median
from typing import Any


@dataclass(frozen=True)
class Point:
    """One evaluation: training seconds so far, bytes one rank has sent so far, accuracy from 0 to 1."""

    step: int
    seconds: float
    sent_bytes: float
    accuracy: float


@dataclass(frozen=True)
class Result:
    """What one run measured. Times in seconds, sizes in bytes; per-step figures are of rank 0 unless stated.

    Attributes:
        host: "horovod" or "deepspeed".
        scheme: name of the compression scheme.
        steps: training steps.
        accuracy: of the last evaluation.
        step_s: median time of a step.
        compute_s: median time of the same step without communication, on the same core during the same run.
        sent_bytes: bytes that a rank sent over its interface in a step: mean over all ranks and all steps.
        typical_bytes: the same, median over the steps: without the rare dense ones (warm-up, flush).
        points: evaluations in order of time.
        seed: of the initial weights and the order of the data.
    """

    host: str
    scheme: str
    steps: int
    accuracy: float
    step_s: float
    compute_s: float
    sent_bytes: float
    typical_bytes: float
    points: list[Point] = field(default_factory=list)
    seed: int = 0

    @property
    def exposed_s(self) -> float:
        """Time of a step beyond the same step without communication."""
        return max(0.0, self.step_s - self.compute_s)

    def reached(self, target: float) -> float | None:
        """Training seconds until two evaluations in a row are at `target` or above; None if that never happens."""
        for first, second in zip(self.points, self.points[1:], strict=False):
            if min(first.accuracy, second.accuracy) >= target:
                return first.seconds
        return None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Result:
        return cls(**{**data, "points": [Point(**point) for point in data["points"]]})


def read_records(path: Path) -> list[dict[str, Any]]:
    """The records of one rank; an unfinished last line (the rank is still writing) is left out."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]


def read_run(folder: Path, host: str, scheme: str, seed: int = 0) -> Result:
    """Figures of the run whose ranks recorded into `folder`.

    Raises:
        ValueError: a rank's file is missing or the rank did not come to its end.
    """
    ranks = [read_records(path) for path in sorted(folder.glob("rank*.jsonl"))]
    if not ranks or len(ranks) != ranks[0][0]["ranks"] or any(r[-1]["kind"] != "end" for r in ranks):
        raise ValueError(f"{folder} does not hold a finished run: {[len(r) for r in ranks]} records a rank")
    # On loopback all ranks read one counter, so each of them sees what all have sent.
    share = len(ranks) if ranks[0][0]["interface"] == "lo" else 1
    steps = [[r for r in records if r["kind"] == "step"] for records in ranks]
    per_step = [mean(rank[i]["sent_bytes"] for rank in steps) / share for i in range(len(steps[0]))]
    points = [
        Point(r["step"], r["train_s"], sum(per_step[: r["step"]]), r["accuracy"])
        for r in ranks[0]
        if r["kind"] == "evaluation"
    ]
    return Result(
        host=host,
        scheme=scheme,
        steps=len(per_step),
        accuracy=points[-1].accuracy,
        step_s=median(r["seconds"] for r in steps[0]),
        compute_s=median(r["seconds"] for r in ranks[0] if r["kind"] == "compute"),
        sent_bytes=mean(per_step),
        typical_bytes=median(per_step),
        points=points,
        seed=seed,
    )
