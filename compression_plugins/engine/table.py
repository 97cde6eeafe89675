"""The start-up table, tensor by tensor: what travels how, in which bucket, at what cost, and by which rule."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from ..config import Config
from ..errors import ConfigError, UnsupportedError
from .plan import Plan, make_plan, unmatched
from .session import Session

if TYPE_CHECKING:
    from torch import Tensor, nn

_HEAD = ("tensor", "shape", "dtype", "bucket", "bytes", "ratio", "scheme", "because of")


def explain(config: Config, model: nn.Module, size: int) -> str:
    """What a job would print, and a line for each tensor.

    Args:
        model: its parameters are looked at, nothing is computed.
        size: ranks.

    Raises:
        ConfigError: a rule or an exemption matches no parameter.
        UnsupportedError: a scheme cannot run on so many ranks.
    """
    if config.levels == "node":
        raise UnsupportedError("levels: node depends on which ranks share a host: give their number for this table")
    config.check_ranks(size)
    node = config.levels or 1
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
    for _, message in unmatched(config, [*named, *frozen]):
        raise ConfigError(f"{message}. Correct it or remove it")
    plan = make_plan(config, Session.specs(named))
    lines = [plan.table(size, config.every, node), "", *rows(plan, named, size, config.every, node)]
    if frozen:
        lines += ["", f"without a gradient, not sent: {', '.join(frozen)}"]
    return "\n".join(lines)


def rows(plan: Plan, parameters: Mapping[str, Tensor], size: int, every: int = 1, node: int = 1) -> list[str]:
    """A line for each tensor, in registration order, under a head. Bytes are those of a step and rank, of the tensor's
    part of its bucket; the ratio is to a dense ring in the tensor's own dtype.
    """
    places = {s.name: (i, bucket, s) for i, bucket in enumerate(plan.buckets) for s in bucket.segments}
    cells = [_HEAD]
    for row in plan.rows:
        number, bucket, segment = places[row.name]
        part = segment.numel / bucket.numel if bucket.numel else 0.0
        sent, dense = part * bucket.wire_bytes(size, node) / every, part * bucket.dense_bytes(size)
        parameter = parameters[row.name]
        cells.append((
            row.name,
            "x".join(map(str, parameter.shape)) or "scalar",
            str(parameter.dtype).removeprefix("torch."),
            str(number),
            f"{sent:,.0f}",
            f"{dense / sent:.1f}" if sent else "-",
            row.scheme.name,
            row.reason or row.rule or "scheme",
        ))  # fmt: skip
    widths = [max(map(len, column)) for column in zip(*cells)]
    left = {0, 1, 2, 6, 7}
    return [
        "  ".join(f"{c:<{w}}" if i in left else f"{c:>{w}}" for i, (c, w) in enumerate(zip(line, widths))).rstrip()
        for line in cells
    ]
