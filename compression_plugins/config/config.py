"""One document - YAML, JSON or a dict - selects the scheme and everything about it, for every host.

scheme: scalecom        # any name that `compression-plugins schemes` lists
ratio: 100              # keys of the scheme stand beside the general ones
warmup_steps: 500
direction: momentum     # what travels; a word, or {kind: momentum, momentum: 0.9}
rules:                  # first match wins
  - {match: "embed*", scheme: qsgd, bits: 4}
  - {match: "head.weight", ratio: 25}
parameters: {scheme: patch}   # how weights travel, where they do (ZeRO)
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, SerializeAsAny, ValidationError

from ..errors import ConfigError, UnsupportedError, nearest, shown
from ..optimizer.directions import GRADIENT, KINDS, Direction
from ..schemes import registry
from ..schemes.base import Scheme
from .document import parse_json, read_document
from .parameters import read_parameters

#: Carries a configuration, as JSON, from a launcher to its workers.
ENVIRONMENT_VARIABLE = "COMPRESSION_PLUGINS_CONFIG"
_CONFIGS = Path(__file__).parents[1] / "configs"


class Outer(BaseModel):
    """What becomes of the mean drift of the ranks' weights, where they train by themselves (`every`)."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    lr: Annotated[float, Field(gt=0, le=2)] = Field(1.0, description="part of the mean drift that is taken")
    momentum: Annotated[float, Field(ge=0, lt=1)] = Field(0.0, description="of the mean drifts, as in torch.optim.SGD")
    nesterov: bool = Field(False, description="as in torch.optim.SGD")
    moments: Literal["local", "mean"] = Field(
        "local", description="mean: an exchange also averages what the optimizer keeps of each element, as it is"
    )


class Settings(BaseModel):
    """The keys that every scheme shares."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    seed: Annotated[int, Field(ge=0, lt=2**32)] = Field(0, description="seed of every random choice; same on all ranks")
    bucket_mb: Annotated[float, Field(gt=0, le=4096)] | Literal["auto"] = Field(
        "auto",
        description="tensors are compressed and sent in buckets of so many MiB of fp32; auto: a quarter, 2 to 25",
    )
    warmup_steps: Annotated[int, Field(ge=0, le=10**12)] = Field(
        0, description="optimizer steps sent dense before compression"
    )
    min_numel: Annotated[int, Field(ge=0, le=10**12)] = Field(1024, description="smaller tensors travel as they are")
    exempt: list[str] = Field([], description="name patterns (shell style) of tensors that travel as they are")
    every: Annotated[int, Field(ge=1, le=100_000)] = Field(
        1, description="optimizer steps that each rank takes by itself between exchanges; 1: gradients travel in each"
    )
    outer: Outer = Field(Outer(), description="of every > 1: what becomes of the mean drift of the weights")
    verify: bool = Field(
        False, description="a checksum in every message that is not a sum; damage ends the job and names the sender"
    )
    check_every: Annotated[int, Field(ge=0)] = Field(
        0, description="steps after which ranks compare all parameters, to the bit; 0: never"
    )
    cosine_every: Annotated[int, Field(ge=0)] = Field(
        0, description="steps after which telemetry compares averages with dense ones, which then travel too; 0: never"
    )
    on_nonfinite: Literal["pass", "raise", "skip"] = Field(
        "pass",
        description="of a gradient that is not finite: pass it on as the host does, end the job, or skip the step",
    )
    levels: Annotated[int, Field(ge=2, le=65536)] | Literal["node"] | None = Field(
        None,
        description="the ranks of a node average dense first, and compressed across nodes; node: ranks that share a "
        "host, or how many follow each other",
    )
    direction: SerializeAsAny[Direction] = Field(
        GRADIENT, description="what travels: a word, or a mapping of `kind` and its parameters; `optimizer.directions`"
    )


class Rule(BaseModel):
    """Tensors whose name matches `match` use `scheme`; the first rule that matches wins."""

    model_config = ConfigDict(frozen=True)
    match: str
    scheme: Scheme


class Config(Settings):
    """A validated, immutable configuration. Build one with `Config.load`."""

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True)
    scheme: Scheme
    rules: tuple[Rule, ...] = ()
    parameters: Scheme | None = None

    @classmethod
    def load(
        cls, source: str | os.PathLike[str] | Mapping[str, Any], overrides: Mapping[str, Any] | None = None
    ) -> Config:
        """Read a configuration.

        Args:
            source: name of a scheme (its shipped YAML is read) or of a preset, path of a YAML or JSON file, or a
                mapping.
            overrides: keys that replace those of `source`; a different `scheme` drops the other scheme's keys.

        Raises:
            ConfigError: one sentence: what is wrong, where, and the nearest valid choice.

        Example::

            from compression_plugins import Config

            config = Config.load("scalecom", {"ratio": 50, "exempt": ["*.head.*"]})
            print(config.scheme.ratio, config.to_dict())
        """
        document, where = _read(source)
        if overrides and overrides.get("scheme", document.get("scheme")) != document.get("scheme"):
            document = {k: v for k, v in document.items() if k in {*Settings.model_fields, "parameters"}}
        return _build({**document, **(overrides or {})}, where)

    def to_dict(self) -> dict[str, Any]:
        """The whole configuration as JSON-able values; `Config.load` of it gives an equal object."""
        general = self.model_dump(mode="json", include=set(Settings.model_fields))
        rules = [{"match": r.match, **_scheme_dict(r.scheme)} for r in self.rules]
        parameters = {"parameters": _scheme_dict(self.parameters)} if self.parameters else {}
        return {**_scheme_dict(self.scheme), **general, "rules": rules, **parameters}

    @property
    def suits_adam(self) -> bool:
        """Whether gradients that travel in each step reach the loss of dense training under Adam; see `Scheme`."""
        return all(scheme.suits_adam for scheme in (self.scheme, *(rule.scheme for rule in self.rules)))

    @property
    def watches(self) -> bool:
        """Whether something is looked at beside the reduction, also of gradients that travel as they are."""
        return self.verify or self.check_every > 0 or self.on_nonfinite != "pass"

    @property
    def period(self) -> int:
        """Rounds after which the traffic of all schemes repeats itself."""
        schemes = [self.scheme, *(rule.scheme for rule in self.rules)]
        share = self.direction.exact_share
        return math.lcm(*(scheme.period for scheme in schemes), round(1 / share) if share else 1)

    def check_ranks(self, size: int) -> None:
        """Raises `UnsupportedError` if a scheme cannot run on `size` ranks, or they cannot be divided into nodes. Where
        nodes are hosts, how many meet is known in the job only.
        """
        if self.levels == "node":
            return
        if self.levels is not None and size > 1 and size % self.levels:
            valid = [str(node) for node in range(2, size + 1) if size % node == 0]
            raise UnsupportedError(
                f"levels: {self.levels}: {size} ranks cannot be divided into nodes of {self.levels}; valid: "
                f"{', '.join(valid)}, or node"
            )
        self.check_schemes(max(1, size // (self.levels or 1)))

    def check_schemes(self, size: int) -> None:
        """Raises `UnsupportedError` if a scheme cannot run on `size` ranks."""
        for scheme in (self.scheme, *(rule.scheme for rule in self.rules)):
            scheme.check_ranks(size)

    def digest(self) -> str:
        """SHA-256 (hex) that two ranks share exactly when their configurations are equal."""
        return hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True).encode()).hexdigest()


def from_environment() -> Config | None:
    """The configuration that a launcher exported to this process, or None."""
    text = os.environ.get(ENVIRONMENT_VARIABLE)
    if not text:
        return None
    where = f"environment variable {ENVIRONMENT_VARIABLE}"
    try:
        document = parse_json(text)
    except ConfigError as error:
        raise ConfigError(f"{where} {error}") from None
    if not isinstance(document, dict):
        raise ConfigError(f"{where} must hold a mapping, not {shown(document)}")
    return _build(document, where)


def _scheme_dict(scheme: Scheme) -> dict[str, Any]:
    return {"scheme": scheme.name, **scheme.model_dump(mode="json")}


def _read(source: str | os.PathLike[str] | Mapping[str, Any]) -> tuple[dict[str, Any], str]:
    if isinstance(source, Mapping):
        return dict(source), "compression config"
    if not isinstance(source, str | os.PathLike):
        raise ConfigError(f"a configuration is a name, a path or a mapping, not {shown(source)}")
    path = Path(source)
    if path.suffix.lower() not in {".yaml", ".yml", ".json"} and not _is_file(path):
        known = {*registry.names(), *presets()}
        if str(source) not in known:
            raise ConfigError(f"unknown scheme {shown(str(source))}{nearest(str(source), known)}")
        path = _CONFIGS / f"{source}.yaml"
    return read_document(path), str(path)


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a name that is too long
        return False


def presets() -> dict[str, str]:
    """Shipped configurations that are more than a scheme with its defaults: name, as in `transformer/small`, and the
    first line of the file.
    """
    found = {}
    for path in sorted(_CONFIGS.glob("transformer/*.yaml")):
        found[f"{path.parent.name}/{path.stem}"] = path.read_text(encoding="utf-8").partition("\n")[0].strip("# ")
    return found


def _build(document: dict[str, Any], where: str) -> Config:
    _check_keys(document, where)
    if "scheme" not in document:
        raise ConfigError(f"{where}: the key 'scheme' is missing; valid: {', '.join(registry.names())}")
    general = {k: document[k] for k in Settings.model_fields if k in document}
    own = {k: v for k, v in document.items() if k not in {*Settings.model_fields, "scheme", "rules", "parameters"}}
    scheme = _scheme(document["scheme"], own, where, others={*Settings.model_fields, "rules", "parameters"})
    rules = document.get("rules") or []
    if not isinstance(rules, list):
        raise ConfigError(f"{where}: rules must be a list, not {type(rules).__name__}")
    built = tuple(_rule(rule, scheme, f"{where}: rules[{i}]") for i, rule in enumerate(rules))
    if "direction" in general:
        general["direction"] = _direction(general["direction"], where)
    try:
        settings = Settings(**general)
    except ValidationError as error:
        raise ConfigError(f"{where}: {_first(error)}") from None
    try:
        settings.direction.check(settings.warmup_steps)
        _check_rounds(settings)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None
    parameters = read_parameters(document.get("parameters"), where)
    return Config.model_construct(**dict(settings), scheme=scheme, rules=built, parameters=parameters)


def _check_rounds(settings: Settings) -> None:
    """What `every`, `outer` and `direction` rule out for each other."""
    outer, direction = settings.outer, settings.direction
    if settings.every == 1 and outer != Outer():
        raise ConfigError("outer is what becomes of local steps, and there are none: set every to 2 or more")
    if outer.nesterov and not outer.momentum:
        raise ConfigError("outer.nesterov needs a momentum: set outer.momentum, or leave nesterov at false")
    if settings.every > 1 and settings.on_nonfinite != "pass":
        raise ConfigError(
            f"with every: {settings.every} gradients do not travel, so ranks cannot agree on on_nonfinite: "
            f"{settings.on_nonfinite}: leave it at pass, or set every to 1"
        )
    if settings.every > 1 and direction.formed:
        raise ConfigError(
            f"with every: {settings.every} gradients do not travel, so no direction: {direction.kind} is formed: "
            "leave direction at gradient and let the script's optimizer have the moments, or set every to 1"
        )


def _direction(value: Any, where: str) -> Direction:
    if isinstance(value, Direction):
        return value
    own = {"kind": value} if isinstance(value, str) else value
    if not isinstance(own, Mapping) or not isinstance(own.get("kind"), str):
        raise ConfigError(
            f"{where}: direction is a word or a mapping with a text 'kind', for example {{kind: momentum, momentum: "
            f"0.9}}, not {shown(value)}; valid: {', '.join(KINDS)}"
        )
    kind = own["kind"]
    if kind not in KINDS:
        raise ConfigError(f"{where}: unknown direction {shown(kind)}{nearest(kind, KINDS)}")
    _check_keys(own, where)
    for key in own:
        if key not in KINDS[kind].model_fields:
            hint = nearest(key, KINDS[kind].model_fields)
            raise ConfigError(f"{where}: unknown key {shown(key)} for direction {kind!r}{hint}")
    try:
        return KINDS[kind](**own)
    except ValidationError as error:
        raise ConfigError(f"{where}: direction {kind!r}: {_first(error)}") from None


def _rule(rule: Any, default: Scheme, where: str) -> Rule:
    if not isinstance(rule, dict) or not isinstance(rule.get("match"), str):
        raise ConfigError(
            f"{where}: a rule is a mapping with a text 'match', for example {{match: 'embed*', scheme: none}}"
        )
    _check_keys(rule, where)
    own = {k: v for k, v in rule.items() if k not in {"match", "scheme"}}
    if rule.get("scheme", default.name) == default.name:  # a rule may change only some keys of the scheme
        own = {**default.model_dump(), **own}
    return Rule(match=rule["match"], scheme=_scheme(rule.get("scheme", default.name), own, where, others={"match"}))


def _scheme(name: Any, own: dict[str, Any], where: str, others: set[str]) -> Scheme:
    if not isinstance(name, str):
        raise ConfigError(f"{where}: scheme must be a name, not {shown(name)}; valid: {', '.join(registry.names())}")
    try:
        cls = registry.get(name)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None
    for key in own:
        if key not in cls.model_fields:
            hint = nearest(key, {*cls.model_fields, *others, "scheme"})
            raise ConfigError(f"{where}: unknown key {shown(key)} for scheme {name!r}{hint}")
    try:
        return cls(**own)
    except ValidationError as error:
        raise ConfigError(f"{where}: scheme {name!r}: {_first(error)}") from None


def _check_keys(document: Mapping[Any, Any], where: str) -> None:
    for key in document:
        if not isinstance(key, str):
            raise ConfigError(f"{where}: a key must be a text, not {shown(key)}")


def _first(error: ValidationError) -> str:
    detail, *others = error.errors()
    if detail["type"] == "extra_forbidden":
        *path, key = detail["loc"]
        return f"unknown key {shown(key)} in {'.'.join(map(str, path))}{nearest(str(key), Outer.model_fields)}"
    where, message = detail["loc"], f"{detail['msg'][0].lower()}{detail['msg'][1:]}"
    for other in others:  # of a key that takes a number or a word, pydantic reports both, under the names of its types
        if other["type"] == "literal_error" and other["loc"][:1] == where[:1]:
            where, message = where[:1], f"{message}, or be {other['ctx']['expected']}"
    return f"{'.'.join(str(part) for part in where) or 'values'} = {shown(detail['input'])}: {message}"
