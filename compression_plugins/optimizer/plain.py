"""Is a script's optimizer plain SGD, which adds a learning rate to a direction and nothing else?"""

from __future__ import annotations

from typing import Any

from .._lazy import torch
from ..errors import UnsupportedError

#: What `torch.optim.SGD` may be given; another class with no more than these is SGD too.
_KEYS = {"lr", "momentum", "dampening", "weight_decay", "nesterov"}
_SWITCHES = {"maximize", "foreach", "differentiable", "fused"}


def check_plain(optimizer: Any, what: str) -> None:
    """Refuse an optimizer that is not SGD without momentum. `weight_decay` is allowed: it is added to the direction,
    so it is decoupled, as AdamW's.

    Args:
        optimizer: with `param_groups` and `defaults`, as torch's.
        what: begins the message.

    Raises:
        UnsupportedError: it has moments of its own, which the direction has already.
    """
    keys = set(optimizer.defaults)
    known = isinstance(optimizer, torch.optim.SGD) or (_KEYS - {"weight_decay"} <= keys <= _KEYS | _SWITCHES)
    why = "" if known else f"{type(optimizer).__name__} is another optimizer"
    for group in optimizer.param_groups if known else ():
        for key in ("momentum", "nesterov"):
            if group.get(key):
                why = f"this {type(optimizer).__name__} has {key} {group[key]!r}"
    if why:
        raise UnsupportedError(
            f"{what} has the optimizer's moments before the average, so the script's optimizer must be plain SGD, but "
            f"{why}: use torch.optim.SGD(lr=...), or direction: gradient"
        )
