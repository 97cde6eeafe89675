"""Which tensor travels how: configuration + named tensors -> buckets, the same on every rank."""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property
from typing import NamedTuple

from .config import Config
from .errors import ConfigError, nearest
from .schemes.base import Scheme, Segment

_BUCKETS, _SMALLEST_MB, _LARGEST_MB = 4, 2.0, 25.0  # of `bucket_mb: auto`


class TensorSpec(NamedTuple):
    """What a plan needs to know of a floating-point parameter."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    device: str = "cpu"

    @property
    def numel(self) -> int:
        numel = 1
        for side in self.shape:
            numel *= side
        return numel


class Row(NamedTuple):
    """The decision for one tensor; `reason` says why it travels as it is."""

    name: str
    numel: int
    scheme: Scheme
    reason: str = ""


@dataclass(frozen=True)
class Bucket:
    """Tensors that are compressed and sent as one flat fp32 vector, in the order of `segments`."""

    scheme: Scheme
    segments: tuple[Segment, ...]
    device: str = "cpu"

    @cached_property
    def numel(self) -> int:
        return sum(segment.numel for segment in self.segments)

    @cached_property
    def id(self) -> int:
        """32-bit number made of the names, so that random draws do not depend on the order of buckets."""
        return zlib.crc32("\n".join(f"{s.name}@{s.start}" for s in self.segments).encode())


@dataclass(frozen=True)
class Plan:
    """The buckets in the order in which backward fills them, and a row for every tensor."""

    buckets: tuple[Bucket, ...]
    rows: tuple[Row, ...]

    def table(self) -> str:
        """What is compressed, how, and what is not and why; for the log at start-up."""
        groups: dict[tuple[str, str], list[Row]] = {}
        for row in self.rows:
            groups.setdefault((_describe(row.scheme), row.reason), []).append(row)
        lines = [f"{len(self.rows)} tensors, {sum(r.numel for r in self.rows):,} values, {len(self.buckets)} buckets"]
        for (scheme, reason), rows in groups.items():
            why = (
                f" ({reason}: {', '.join(r.name for r in rows[:3])}{', ...' if len(rows) > 3 else ''})"
                if reason
                else ""
            )
            lines.append(f"  {scheme}: {len(rows)} tensors, {sum(r.numel for r in rows):,} values{why}")
        return "\n".join(lines)

    def digest(self) -> str:
        """SHA-256 (hex) of names, shapes and buckets."""
        layout = [[bucket.scheme.name, bucket.segments] for bucket in self.buckets]
        return hashlib.sha256(json.dumps(layout).encode()).hexdigest()


def make_plan(config: Config, specs: Sequence[TensorSpec]) -> Plan:
    """Decide for every tensor, in registration order, and pack buckets in reverse order, as backward produces
    gradients.

    The first rule that matches a name decides. Without one, a tensor that `exempt` names, that is smaller than
    `min_numel` or that has fewer than two dimensions (biases, norms) travels as it is.

    Raises:
        ConfigError: a rule matches no tensor.
    """
    for rule in config.rules:
        if not any(fnmatchcase(spec.name, rule.match) for spec in specs):
            hint = nearest(rule.match.strip("*"), [spec.name for spec in specs])
            raise ConfigError(f"rule {rule.match!r} matches none of the {len(specs)} tensors{hint[:400]}")
    rows = tuple(_decide(config, spec) for spec in specs)
    return Plan(_pack(config, specs, rows), rows)


def _decide(config: Config, spec: TensorSpec) -> Row:
    for rule in config.rules:
        if fnmatchcase(spec.name, rule.match):
            reason = f"rule {rule.match!r}" if rule.scheme.host_dense else ""
            return Row(spec.name, spec.numel, rule.scheme, reason)
    if config.scheme.host_dense:
        return Row(spec.name, spec.numel, config.scheme)
    reason = next((f"exempt {pattern!r}" for pattern in config.exempt if fnmatchcase(spec.name, pattern)), "")
    if not reason and spec.numel < config.min_numel:
        reason = f"below min_numel {config.min_numel}"
    if not reason and len(spec.shape) < 2:
        reason = "fewer than 2 dimensions"
    return Row(spec.name, spec.numel, config.scheme.dense if reason else config.scheme, reason)


def _bucket_numel(config: Config, specs: Sequence[TensorSpec]) -> int:
    """Values that a bucket may hold. `auto`: so few that the first buckets of a small model travel during backward, and
    not so few that the latency of their messages counts.
    """
    if config.bucket_mb != "auto":
        return int(config.bucket_mb * 2**20 / 4)
    quarter = sum(spec.numel for spec in specs) * 4 / 2**20 / _BUCKETS
    return int(min(_LARGEST_MB, max(_SMALLEST_MB, quarter)) * 2**20 / 4)


def _pack(config: Config, specs: Sequence[TensorSpec], rows: Sequence[Row]) -> tuple[Bucket, ...]:
    limit = _bucket_numel(config, specs)
    done: list[Bucket] = []
    open_: dict[tuple[str, str], list[Segment]] = {}
    schemes: dict[tuple[str, str], Scheme] = {}
    for spec, row in reversed(list(zip(specs, rows))):
        key = (_describe(row.scheme), spec.device)
        segments = open_.get(key, [])
        if segments and sum(s.numel for s in segments) + spec.numel > limit:
            done.append(Bucket(schemes[key], tuple(segments), key[1]))
            segments = []
        schemes[key] = row.scheme
        open_[key] = [*segments, Segment(spec.name, 0, spec.numel, tuple(spec.shape))]
    done.extend(Bucket(schemes[key], tuple(segments), key[1]) for key, segments in open_.items() if segments)
    order = {spec.name: i for i, spec in enumerate(specs)}
    return tuple(sorted(done, key=lambda bucket: -min(order[s.name] for s in bucket.segments)))


def _describe(scheme: Scheme) -> str:
    parameters = ", ".join(f"{k}={v}" for k, v in scheme.model_dump().items())
    name = f"{scheme.name}({parameters})" if parameters else scheme.name
    return name if scheme.trains else f"{name}, for timing only (the model does not train)"
