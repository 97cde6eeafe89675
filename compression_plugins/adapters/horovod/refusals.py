"""What a configuration cannot do under Horovod, each with its remedy."""

from __future__ import annotations

import os

from ...config import Config
from ...engine.plan import Plan
from ...errors import UnsupportedError
from ...schemes import registry


def refuse_levels(levels: int | str, elastic: bool, some_ranks: bool) -> None:
    """Raise `UnsupportedError` where the groups of ranks that `levels` needs cannot be made.

    Args:
        elastic: the job's ranks may change.
        some_ranks: the optimizer has a process set of its own.
    """
    asked = f"horovod compression: levels: {levels} "
    if elastic:
        raise UnsupportedError(f"{asked}makes groups of ranks once, and those of an elastic job change: remove it")
    if some_ranks:
        raise UnsupportedError(
            f"{asked}divides all ranks of the job, and this optimizer has a process set: remove one of the two"
        )
    if os.environ.get("HOROVOD_DYNAMIC_PROCESS_SETS") != "1":
        raise UnsupportedError(
            f"{asked}makes groups of ranks: export HOROVOD_DYNAMIC_PROCESS_SETS=1 before the job starts, which "
            "horovodrun --compression does"
        )


def refuse_join(config: Config, plan: Plan) -> None:
    """Raise `UnsupportedError` where ranks that have joined, which add zeros to sums and do nothing else, would crash
    Horovod's communication thread, or spoil what the others share.
    """
    asked, remedy = "horovod compression: after hvd.join() a rank", "give every rank the same number of steps"
    if config.check_every:
        raise UnsupportedError(
            f"{asked} takes no steps, so that check_every cannot compare parameters; set check_every: 0, or {remedy}"
        )
    if config.every > 1:
        raise UnsupportedError(
            f"{asked} can only add zeros to sums, and with every > 1 it would pull the weights to where it stopped; "
            f"set every: 1, or {remedy}"
        )
    if config.levels is not None:
        raise UnsupportedError(
            f"{asked} can only add zeros to sums, and levels needs more: remove the key, or {remedy}"
        )
    if config.direction.shared:
        raise UnsupportedError(
            f"{asked} misses the moments that direction: {config.direction.kind} keeps alike on all: {remedy}, or use "
            "direction: gradient"
        )
    for bucket in plan.buckets:
        if not bucket.scheme.sums_only or bucket.dtype == "bfloat16":
            able = ", ".join(name for name in registry.names() if registry.get(name).sums_only)
            raise UnsupportedError(
                f"{asked} can only add zeros to sums; {bucket.scheme.name!r} needs more. Use a scheme of sums "
                f"({able}), or {remedy}"
            )
