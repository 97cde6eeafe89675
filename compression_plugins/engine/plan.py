"""Which tensor travels how: configuration + named tensors -> buckets, the same on every rank."""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import cached_property, lru_cache
from typing import NamedTuple

from ..config import Config
from ..core.call import Role, Segment, total
from ..errors import nearest
from ..optimizer.directions import GRADIENT, Direction
from ..schemes.base import NoCompression, Scheme
from .marks import marks_bits
from .parts import part_of

_BUCKETS, _SMALLEST_MB, _LARGEST_MB = 4, 2.0, 25.0  # of `bucket_mb: auto`
#: Bytes of an element; kernels compute in fp32, so wider tensors travel as they are.
_BYTES = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2}
_COMPRESSED = ("float32", "float16", "bfloat16")


class TensorSpec(NamedTuple):
    """What a plan needs to know of a floating-point parameter. `dtype` as in `"float32"`."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    device: str = "cpu"

    @property
    def numel(self) -> int:
        """Number of elements."""
        numel = 1
        for side in self.shape:
            numel *= side
        return numel


class Row(NamedTuple):
    """The decision for one tensor; `reason` says why it travels as it is, `rule` which rule chose its scheme."""

    name: str
    numel: int
    scheme: Scheme
    reason: str = ""
    rule: str = ""


@dataclass(frozen=True)
class Bucket:
    """Tensors that are compressed and sent as one flat vector, in the order of `segments`.

    The vector is fp32 where a scheme compresses or a `direction` is formed, and of the tensors' own `dtype` otherwise.
    With `sharded` each rank gets the average of its own shard only; with `host_scatters` it would without compression.
    """

    scheme: Scheme
    segments: tuple[Segment, ...]
    device: str = "cpu"
    dtype: str = "float32"
    role: Role = "gradient"
    sharded: bool = False
    host_scatters: bool = False
    direction: Direction = GRADIENT

    def __hash__(self) -> int:
        return self.id  # of all segments would take long, and books are kept by bucket at every step

    @cached_property
    def numel(self) -> int:
        """Number of elements of all segments."""
        return total(self.segments)

    @cached_property
    def id(self) -> int:
        """32-bit number made of the names, so that random draws do not depend on the order of buckets."""
        role = "" if self.role == "gradient" else f"{self.role}/"
        return zlib.crc32(role.encode() + "\n".join(f"{s.name}@{s.start}" for s in self.segments).encode())

    def wire_bytes(self, size: int, node: int = 1) -> float:
        """Bytes that each of `size` ranks sends to average this bucket once, the mean over ranks and steps.

        Args:
            node: ranks that average among themselves first (`levels`).
        """
        if not self.numel:
            return 0.0
        share = self.direction.exact_share
        if node == 1 or self.scheme.host_dense:
            bits = self._compressed_bits(size)
        else:
            bits = part(self, node, 0)._compressed_bits(size // node) if size > node else 0.0
        coded = (1 - share) * bits / 8 + self.inside_bytes(node)
        return coded + share * NoCompression().wire_bits(self.segments, size) / 8

    def inside_bytes(self, node: int) -> float:
        """The bytes of these that do not leave the rank's node: a reduce-scatter and an all-gather, dense."""
        if node == 1 or self.scheme.host_dense:
            return 0.0
        return (1 - self.direction.exact_share) * 8 * part(self, node, 0).numel * (node - 1)

    def _compressed_bits(self, size: int) -> float:
        bits = (self.scheme.scatter_bits if self.sharded else self.scheme.wire_bits)(self.segments, size)
        if self.scheme.host_dense and not self.direction.formed:
            bits *= _BYTES.get(self.dtype, 4) / 4
        if not self.scheme.says_zero:
            bits += marks_bits(self.segments, size)
        return bits

    def dense_bytes(self, size: int) -> float:
        """The same for a dense ring in the tensors' own dtype."""
        rounds = 1 if self.host_scatters else 2
        return rounds * self.numel * _BYTES.get(self.dtype, 4) * (size - 1) / size


@lru_cache(maxsize=4096)
def part(bucket: Bucket, node: int, index: int) -> Bucket:
    """The bucket of what the rank number `index` of a node owns of `bucket`."""
    return replace(bucket, segments=tuple(part_of(segment, node, index) for segment in bucket.segments))


@dataclass(frozen=True)
class Plan:
    """The buckets in the order in which backward fills them, and a row for every tensor."""

    buckets: tuple[Bucket, ...]
    rows: tuple[Row, ...]

    def memory_bytes(self, node: int = 1) -> int:
        """Bytes that residuals and the moments of a direction take on each rank: fp32, as the last step left them and
        as the running one makes them. Of residuals each rank of a node has its part.
        """
        return sum(
            8 * bucket.numel * bucket.direction.moments
            + (8 * part(bucket, node, 0).numel if bucket.scheme.memory else 0)
            for bucket in self.buckets
        )

    def table(self, size: int, every: int = 1, node: int = 1) -> str:
        """What is compressed, how, what `size` ranks will send, and what is not compressed and why; for the log at
        start-up.

        Args:
            every: steps that ranks take by themselves between exchanges, which are of weights then; 1: none.
            node: ranks that average among themselves first.
        """
        groups: dict[tuple[str, str], list[Row]] = {}
        for row in self.rows:
            groups.setdefault((describe(row.scheme), row.reason), []).append(row)
        exchange = sum(bucket.wire_bytes(size, node) for bucket in self.buckets)
        sent = exchange / every
        rounds = f" ({exchange / 1e6:.3f} MB of weights every {every} steps)" if every > 1 else ""
        dense = sum(bucket.dense_bytes(size) for bucket in self.buckets)
        ratio = f", {dense / sent:.1f}x fewer than dense" if sent else ""
        memory = f", {self.memory_bytes(node) / 1e6:.3f} MB of memory" if self.memory_bytes(node) else ""
        lines = [
            f"{len(self.rows)} tensors, {sum(r.numel for r in self.rows):,} values, {len(self.buckets)} buckets, "
            f"{sent / 1e6:.3f} MB per step and rank{rounds}{ratio}{memory}"
        ]
        if node > 1:
            across = sum(bucket.wire_bytes(size, node) - bucket.inside_bytes(node) for bucket in self.buckets) / every
            lines.append(
                f"  levels: {size // node} nodes of {node} ranks, {across / 1e6:.3f} MB per step and rank of it across "
                "nodes, the rest dense inside them" if size > node else
                f"  levels: all {node} ranks are of one node, inside which they average dense: nothing is compressed"
            )  # fmt: skip
        for (scheme, reason), rows in groups.items():
            names = {row.name for row in rows}
            mine = [bucket for bucket in self.buckets if bucket.segments[0].name in names]
            own = sum(bucket.wire_bytes(size, node) for bucket in mine) / every if not reason else 0.0
            cost = f", {own / 1e6:.3f} MB" if own else ""
            some = f"{', '.join(r.name for r in rows[:3])}{', ...' if len(rows) > 3 else ''}"
            why = f" ({reason}: {some})" if reason else ""
            lines.append(f"  {scheme}: {len(rows)} tensors, {sum(r.numel for r in rows):,} values{cost}{why}")
        return "\n".join(lines)

    def digest(self) -> str:
        """SHA-256 (hex) of names, shapes and buckets."""
        layout = [[bucket.scheme.name, bucket.dtype, bucket.segments] for bucket in self.buckets]
        return hashlib.sha256(json.dumps(layout).encode()).hexdigest()

    def extended(self, more: Plan) -> Plan:
        """This plan with the buckets of another, for tensors that appeared later; its own buckets stay as they are."""
        return Plan(more.buckets + self.buckets, self.rows + more.rows)


def make_plan(config: Config, specs: Sequence[TensorSpec]) -> Plan:
    """Decide for every tensor, in registration order, and pack buckets in reverse order, as backward produces
    gradients.

    The first rule that matches a name decides. Without one, a tensor that `exempt` names, that is smaller than
    `min_numel` or that has fewer than two dimensions (biases, norms) travels as it is. So does, always, a tensor whose
    dtype is wider than the kernels'.
    """
    rows = tuple(_decide(config, spec) for spec in specs)
    return Plan(_pack(config, specs, rows), rows)


def unmatched(config: Config, names: Sequence[str]) -> list[tuple[str, str]]:
    """(pattern, what is wrong) of every rule and exemption that matches none of `names`."""
    patterns = [("rule", rule.match) for rule in config.rules] + [("exempt pattern", word) for word in config.exempt]
    return [
        (pattern, f"{kind} {pattern!r} matches none of the {len(names)} tensors{_nearest(pattern, names)}")
        for kind, pattern in patterns
        if not any(fnmatchcase(name, pattern) for name in names)
    ]


def _nearest(pattern: str, names: Sequence[str]) -> str:
    return nearest(pattern.strip("*"), names)[:400]


def _decide(config: Config, spec: TensorSpec) -> Row:
    row = _choose(config, spec)
    if not row.scheme.host_dense and spec.dtype not in _COMPRESSED:
        return Row(spec.name, spec.numel, NoCompression(), f"{spec.dtype} is wider than what is compressed")
    return row


def _choose(config: Config, spec: TensorSpec) -> Row:
    for rule in config.rules:
        if fnmatchcase(spec.name, rule.match):
            why = f"rule {rule.match!r}"
            return Row(spec.name, spec.numel, rule.scheme, why if rule.scheme.host_dense else "", why)
    if config.scheme.host_dense:
        return Row(spec.name, spec.numel, config.scheme)
    reason = _why_dense(config, spec)
    return Row(spec.name, spec.numel, NoCompression() if reason else config.scheme, reason)


def weights_row(config: Config, spec: TensorSpec) -> Row:
    """The decision for a tensor whose values travel, not its gradient (`parameters`): rules do not count, exemptions
    do, except where nothing is lost.
    """
    assert config.parameters is not None
    if config.parameters.lossless:
        return Row(spec.name, spec.numel, config.parameters)
    reason = _why_dense(config, spec)
    if not reason and spec.dtype not in _COMPRESSED:
        reason = f"{spec.dtype} is wider than what is compressed"
    return Row(spec.name, spec.numel, NoCompression() if reason else config.parameters, reason)


def _why_dense(config: Config, spec: TensorSpec) -> str:
    """Why a tensor without a rule travels as it is; "" where it does not."""
    reason = next((f"exempt {pattern!r}" for pattern in config.exempt if fnmatchcase(spec.name, pattern)), "")
    if not reason and spec.numel < config.min_numel:
        reason = f"below min_numel {config.min_numel}"
    if not reason and len(spec.shape) < 2:
        reason = "fewer than 2 dimensions"
    return reason


def bucket_numel(config: Config, specs: Sequence[TensorSpec]) -> int:
    """Values that a bucket may hold. `auto`: so few that the first buckets of a small model travel during backward, and
    not so few that the latency of their messages counts.
    """
    if config.bucket_mb != "auto":
        return int(config.bucket_mb * 2**20 / 4)
    quarter = sum(spec.numel for spec in specs) * 4 / 2**20 / _BUCKETS
    return int(min(_LARGEST_MB, max(_SMALLEST_MB, quarter)) * 2**20 / 4)


def _pack(config: Config, specs: Sequence[TensorSpec], rows: Sequence[Row]) -> tuple[Bucket, ...]:
    limit = bucket_numel(config, specs)
    done: list[Bucket] = []
    open_: dict[tuple[str, str, str], list[Segment]] = {}
    schemes: dict[tuple[str, str, str], Scheme] = {}
    for spec, row in reversed(list(zip(specs, rows))):
        key = (describe(row.scheme), spec.device, spec.dtype)
        segments = open_.get(key, [])
        if segments and total(segments) + spec.numel > limit:
            done.append(Bucket(schemes[key], tuple(segments), *key[1:], direction=config.direction))
            segments = []
        schemes[key] = row.scheme
        row_numel = spec.numel // spec.shape[0] if len(spec.shape) > 1 and spec.shape[0] else 0
        open_[key] = [*segments, Segment(spec.name, 0, spec.numel, tuple(spec.shape), row_numel)]
    done.extend(
        Bucket(schemes[key], tuple(segments), *key[1:], direction=config.direction)
        for key, segments in open_.items()
        if segments
    )
    order = {spec.name: i for i, spec in enumerate(specs)}
    return tuple(sorted(done, key=lambda bucket: -min(order[s.name] for s in bucket.segments)))


def describe(scheme: Scheme) -> str:
    """A scheme and its parameters, for people."""
    parameters = ", ".join(f"{k}={v}" for k, v in scheme.model_dump().items())
    name = f"{scheme.name}({parameters})" if parameters else scheme.name
    return name if scheme.trains else f"{name}, for timing only (the model does not train)"
