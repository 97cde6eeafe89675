"""The cells of an experiment: one measurement each, with a key that says whether it was done before."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import product
from typing import Any, Literal

from compression_plugins.config import Config

from .settings import LOCAL_PEERS, REAL_MODELS, Choice, Experiment, digest

Kind = Literal["speed", "accuracy", "quality", "prediction"]


@dataclass(frozen=True)
class Cell:
    """One measurement.

    Attributes:
        kind: "speed", a short timed job; "accuracy", a long job with evaluations; "quality", the scheme alone, without
            a network; "prediction", what the advisor says.
        host: the host framework; "local" for quality.
        scheme: label of the scheme; "*" for prediction, which judges all of them.
        model, ranks, rate, seed: as in the experiment's file; a rate of "-" where there is no network.
        steps: timed ones; all of them for accuracy, gradients for quality.
        warmup_steps: untimed ones before them.
        evaluate_every: steps; 0 for none.
        compute_ms: of a step of a synthetic model, else None.
        config: of the scheme; None for peers, and for `none`. For prediction, those of all schemes by label.
        target: of the metric, for the report; a run does not depend on it.
    """

    kind: Kind
    host: str
    scheme: str
    model: str
    ranks: int
    rate: str
    seed: int
    steps: int
    warmup_steps: int = 0
    evaluate_every: int = 0
    compute_ms: float | None = None
    config: dict[str, Any] | None = None
    target: float | None = None

    @cached_property
    def key(self) -> str:
        """Equal exactly for cells whose measurement is the same, the scheme's whole configuration included."""
        return digest({name: value for name, value in asdict(self).items() if name != "target"})

    @property
    def round_steps(self) -> int:
        """Steps from one exchange to the next."""
        return LOCAL_PEERS.get(self.scheme) or (self.config or {}).get("every", 1)

    def settings(self) -> dict[str, Any]:
        """What a row repeats of its cell: everything but the configuration, of which it has the digest."""
        fields = asdict(self)
        config = fields.pop("config")
        return {**fields, "config_digest": config and digest(config)}

    def __str__(self) -> str:
        text = f"{self.kind:10s} {self.host:9s} {self.scheme:20s} {self.model} n={self.ranks} {self.rate}"
        return f"{text} seed {self.seed}"


def cells(experiment: Experiment, choices: Sequence[Choice]) -> list[Cell]:
    """All measurements of an experiment. Cells that are compared with each other are neighbours in time."""
    found: list[Cell] = []
    for ranks, model in product(experiment.ranks, experiment.models):
        if experiment.quality:
            found += _quality(experiment, choices, model, ranks)
        for rate in experiment.rates:
            if experiment.advise:
                found += _prediction(experiment, choices, model, ranks, rate)
            for seed in experiment.seeds:
                found += _speed(experiment, choices, model, ranks, rate, seed)
        if experiment.accuracy and model in experiment.accuracy.target:
            found += _accuracy(experiment, choices, model, ranks)
    return found


def _speed(e: Experiment, choices: Sequence[Choice], model: str, ranks: int, rate: str, seed: int) -> list[Cell]:
    steps, compute = e.steps_at(rate), e.compute_ms.get(model)
    return [
        Cell("speed", host, c.label, model, ranks, rate, seed, steps, e.warmup_steps, 0, compute, c.config)
        for host in e.hosts
        for c in choices
        if c.under(host)
    ]


def _accuracy(e: Experiment, choices: Sequence[Choice], model: str, ranks: int) -> list[Cell]:
    assert e.accuracy
    a = e.accuracy
    return [
        Cell(
            kind="accuracy",
            host=host,
            scheme=c.label,
            model=model,
            ranks=ranks,
            rate=a.rate,
            seed=seed,
            steps=a.steps_of(model),
            evaluate_every=a.evaluate_every,
            config=c.config,
            target=a.target[model],
        )
        for seed in a.seeds
        for host in e.hosts
        for c in choices
        if c.under(host) and _trains(c)
    ]


def _quality(e: Experiment, choices: Sequence[Choice], model: str, ranks: int) -> list[Cell]:
    """On real gradients only: what a synthetic model returns are random numbers."""
    if model not in REAL_MODELS or not e.quality:
        return []
    return [
        Cell("quality", "local", c.label, model, ranks, "-", e.seeds[0], e.quality.steps, config=c.config)
        for c in choices
        if c.config is not None and _trains(c)
    ]


def _prediction(e: Experiment, choices: Sequence[Choice], model: str, ranks: int, rate: str) -> list[Cell]:
    """One a host; its configuration is that of all candidates, which are the same for all hosts."""
    candidates = {choice.label: choice.config for choice in choices if not choice.peer}
    return [
        Cell("prediction", host, "*", model, ranks, rate, 0, 0, 0, 0, e.compute_ms.get(model), candidates)
        for host in e.hosts
        if host != "ddp"  # the peers'; ours under DDP is the host torchrun
    ]


def _trains(choice: Choice) -> bool:
    return choice.config is None or Config.load(choice.config).scheme.trains
