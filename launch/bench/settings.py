"""An experiment, as its YAML file describes it.

hosts: [horovod, ddp]
schemes: [scalecom, ../../configs/demo/marsit.yaml, ddp/powersgd]   # the baselines none, bf16, fake are always there
models: [mlp, gpt2]
ranks: [2]
rates: [100mbit, 1gbit, unlimited]     # of every link, each way; `unlimited` leaves links unshaped
seeds: [0]
steps: {default: 20, 100mbit: 8}       # timed; `warmup_steps` before them are not
compute_ms: {gpt2: 300}                # of a step of a model that is only a list of shapes
accuracy: {steps: 120, rate: unlimited, seeds: [0, 1, 2], target: {mlp: 90}}
quality: {steps: 10}                   # error and size of every scheme on the model's gradients, in this process
advise: true                           # also ask `compression-plugins advise`, for the table of prediction errors
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from compression_plugins.advise import shapes
from compression_plugins.config import Config, read_document
from compression_plugins.errors import ConfigError, nearest

ROOT = Path(__file__).resolve().parents[2]
#: `ddp` is torch with the hooks that it brings, `torchrun` torch with our schemes.
HOSTS = ("horovod", "deepspeed", "ddp", "torchrun")
#: What the issue of a comparison is measured against: stock, 16 bits, and the bytes of a compression without its work.
BASELINES = ("none", "bf16", "fake")
#: Other people's compression, under the only host that has it.
PEERS = {
    "ddp/none": "DDP as it comes",
    "ddp/fp16": "DDP, fp16_compress_hook",
    "ddp/bf16": "DDP, bf16_compress_hook",
    "ddp/powersgd": "DDP, powerSGD_hook of rank 1",
    "ddp/post_local_sgd": "DDP, PostLocalSGDOptimizer: weights averaged every 4 steps",
    "ddp/powersgd2": "DDP, powerSGD_hook of rank 2",
    "horovod/fp16": "hvd.Compression.fp16",
}
#: Of these, steps between exchanges where there is not one in each.
LOCAL_PEERS = {"ddp/post_local_sgd": 4}
#: Trained on real data; a better metric is higher for 1, lower for -1.
REAL_MODELS = {"mlp": 1, "cnn": 1, "transformer": -1}
UNITS = {"mlp": "% test accuracy", "cnn": "% test accuracy", "transformer": "bits a character"}
SYNTHETIC_MODELS = tuple(name for name in shapes.names() if name not in REAL_MODELS)
UNLIMITED = "unlimited"
_RATE = re.compile(r"^(\d+(?:\.\d+)?)(k|m|g)?bit$", re.IGNORECASE)
_UNITS = {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9}


def bits_per_second(rate: str) -> float:
    """The number that a rate in tc's syntax names; infinite for `unlimited`. Raises `ConfigError` for anything else."""
    if rate == UNLIMITED:
        return float("inf")
    match = _RATE.match(rate)
    if not match or not float(match[1]):
        raise ConfigError(f"rate {rate!r}: write it as tc does, for example 100mbit or 2.5gbit, or {UNLIMITED!r}")
    return float(match[1]) * _UNITS[(match[2] or "").lower()]


def _a_rate(rate: str) -> str:
    bits_per_second(rate)
    return rate


def _a_model(name: str) -> str:
    if name not in REAL_MODELS and name not in SYNTHETIC_MODELS:
        raise ConfigError(f"unknown model {name!r}{nearest(name, [*REAL_MODELS, *SYNTHETIC_MODELS])}")
    return name


Rate = Annotated[str, AfterValidator(_a_rate)]
Model = Annotated[str, AfterValidator(_a_model)]
Seeds = Annotated[list[Annotated[int, Field(ge=0, lt=2**31)]], Field(min_length=1)]
Steps = Annotated[int, Field(ge=1, le=1_000_000)]


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class Accuracy(_Strict):
    """Long runs at one rate, that tell how many steps reach a target."""

    steps: Annotated[Steps | dict[Model, Steps], Field(description="training steps of a run, one number or by model")]
    rate: Annotated[Rate, Field(description="rate of the links meanwhile; synchronous results do not depend on it")] = (
        UNLIMITED
    )
    seeds: Annotated[Seeds, Field(description="of weights and data order")] = [0, 1, 2]
    evaluate_every: Annotated[int, Field(ge=1, description="steps")] = 5
    target: Annotated[
        dict[Model, float], Field(min_length=1, description="test accuracy in %, bits a character (transformer)")
    ]

    @model_validator(mode="after")
    def _has_steps(self) -> Accuracy:
        for model in self.target:
            if isinstance(self.steps, dict) and model not in self.steps:
                raise ConfigError(f"steps: nothing is said of {model!r}, which has a target")
        return self

    def steps_of(self, model: str) -> int:
        """Training steps of a run of `model`."""
        return self.steps if isinstance(self.steps, int) else self.steps[model]


class Quality(_Strict):
    """Error and size of every scheme on gradients of the model, all ranks in this process."""

    steps: Annotated[Steps, Field(description="gradients in a row, of dense training")] = 10


class Experiment(_Strict):
    """The whole file; see the module's text for an example."""

    hosts: Annotated[list[Literal["horovod", "deepspeed", "ddp", "torchrun"]], Field(min_length=1)]
    schemes: list[str]
    models: Annotated[list[Model], Field(min_length=1)]
    ranks: Annotated[list[Annotated[int, Field(ge=2, le=64)]], Field(min_length=1)]
    rates: list[Rate] = []
    seeds: Seeds = [0]
    steps: Steps | dict[str, Steps] = 20
    warmup_steps: Annotated[int, Field(ge=0)] = 3
    compute_ms: dict[Model, Annotated[float, Field(gt=0)]] = {}
    accuracy: Accuracy | None = None
    quality: Quality | None = None
    advise: bool = False
    limit_s: Annotated[float, Field(gt=0, description="a job that runs longer has failed")] = 300.0

    @model_validator(mode="after")
    def _is_whole(self) -> Experiment:
        for model in self.models:
            if model in SYNTHETIC_MODELS and model not in self.compute_ms:
                raise ConfigError(f"model {model!r} is a list of shapes; say how long a step computes in compute_ms")
        if isinstance(self.steps, dict):
            for rate in self.steps:
                if rate not in ("default", *self.rates):
                    raise ConfigError(
                        f"steps: {rate!r} is no rate of this file{nearest(rate, ['default', *self.rates])}"
                    )
            if missing := [rate for rate in self.rates if rate not in self.steps and "default" not in self.steps]:
                raise ConfigError(f"steps: nothing is said of {missing[0]!r}; add it or `default`")
        for scheme in self.schemes:
            host = scheme.partition("/")[0]
            if scheme in PEERS and host not in self.hosts:
                raise ConfigError(f"scheme {scheme!r} runs under {host!r}, which hosts does not name")
        if self.accuracy:
            for model in self.accuracy.target:
                if model not in REAL_MODELS:
                    raise ConfigError(f"accuracy: {model!r} has no data to train on; targets are for real models")
        return self

    def steps_at(self, rate: str) -> int:
        """Timed steps of a run at `rate`."""
        return self.steps if isinstance(self.steps, int) else self.steps.get(rate, self.steps.get("default", 1))


@dataclass(frozen=True)
class Choice:
    """One entry of `schemes`.

    Attributes:
        label: for tables: the scheme, `demo/scalecom` for a file of configs/demo, or the peer.
        config: the whole validated configuration; None for a peer and for `none`, which is the host as it comes.
        source: what the host's flag is given: a name or an absolute path; None as above.
    """

    label: str
    config: dict[str, Any] | None = None
    source: str | None = None

    @property
    def peer(self) -> bool:
        return self.label in PEERS

    def under(self, host: str) -> bool:
        """Whether `host` can run it. `none` under `torchrun` would be `ddp/none` once more."""
        if self.peer:
            return self.label.startswith(f"{host}/")
        return host != "ddp" and (host != "torchrun" or self.config is not None)


def load(path: str | os.PathLike[str]) -> tuple[Experiment, list[Choice]]:
    """The experiment and its schemes, baselines first.

    Raises:
        ConfigError: one sentence: what is wrong, and where.
    """
    document = read_document(path)
    try:
        experiment = Experiment.model_validate(document)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    except ValidationError as error:
        raise ConfigError(f"{path}: {_first(error, document)}") from None
    names = [*BASELINES]
    if "ddp" in experiment.hosts:
        names += ["ddp/none", "ddp/bf16"]
    choices: dict[str, Choice] = {}
    for name in dict.fromkeys([*names, *experiment.schemes]):
        try:
            choice = _choice(name, Path(path).parent)
        except ConfigError as error:
            raise ConfigError(f"{path}: schemes: {error}") from None
        if choices.setdefault(choice.label, choice) != choice:
            raise ConfigError(f"{path}: two schemes are called {choice.label!r}; rename one of the files")
    return experiment, list(choices.values())


def digest(document: Any) -> str:
    """16 hex digits of SHA-256 over the JSON of a value."""
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()[:16]


def _choice(name: str, folder: Path) -> Choice:
    if name in PEERS:
        return Choice(name)
    if "/" in name and not name.lower().endswith((".yaml", ".yml", ".json")):
        raise ConfigError(f"unknown peer {name!r}{nearest(name, PEERS)}")
    if name == "none":
        return Choice("none")
    if not name.lower().endswith((".yaml", ".yml", ".json")):
        return Choice(name, Config.load(name).to_dict(), name)
    path = (folder / name).resolve()
    configs = ROOT / "configs"
    label = path.relative_to(configs) if path.is_relative_to(configs) else Path(path.name)
    return Choice(str(label.with_suffix("")), Config.load(path).to_dict(), str(path))


def _first(error: ValidationError, document: dict[str, Any]) -> str:
    detail = error.errors()[0]
    where = ".".join(map(str, detail["loc"]))
    if detail["type"] == "extra_forbidden":
        known = Experiment.model_fields if len(detail["loc"]) == 1 else ()
        return f"unknown key {where!r}" + (nearest(str(detail["loc"][-1]), known) if known else "")
    return f"{where}: "[: None if where else 0] + detail["msg"].removeprefix("Value error, ")
