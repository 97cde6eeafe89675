"""The scale of the loss, where `torch.amp.GradScaler` keeps it: residuals are kept in units of the unscaled loss.

Where ranks train by themselves, each sees its own overflows; the scaler skips a step where any rank saw one, so that
all count the same steps and keep the same scale.
"""

from __future__ import annotations

import functools
import weakref
from typing import Any, Protocol

import torch
from torch import Tensor

from .notice import warn

_scalers: weakref.WeakSet[Any] = weakref.WeakSet()


class Sharing(Protocol):
    """Whose ranks look for overflows together, in the order of their names."""

    @property
    def name(self) -> str: ...

    @property
    def started(self) -> bool: ...

    def agree(self, optimizer: Any, found_inf: Tensor) -> None:
        """Let `found_inf`, of this rank's gradients of `optimizer`, be 1 where it is on any rank."""
        ...


_sharing: weakref.WeakSet[Any] = weakref.WeakSet()


def watch() -> None:
    """Notice the gradient scalers that a script makes from now on. Idempotent."""
    cls = torch.amp.GradScaler
    if hasattr(cls.__init__, "_noticed"):
        return
    original = cls.__init__

    @functools.wraps(original)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        _scalers.add(self)

    look = cls._unscale_grads_

    @functools.wraps(look)
    def _unscale_grads_(self: Any, optimizer: Any, *args: Any, **kwargs: Any) -> Any:
        found: dict[torch.device, Tensor] = look(self, optimizer, *args, **kwargs)
        for session in sorted((s for s in _sharing if s.started), key=lambda s: s.name):
            for value in found.values():
                session.agree(optimizer, value)
        return found

    __init__._noticed = True  # type: ignore[attr-defined]
    cls.__init__ = __init__  # type: ignore[method-assign]
    cls._unscale_grads_ = _unscale_grads_  # type: ignore[method-assign]


def share(session: Sharing) -> None:
    """Ask `session` whether another of its ranks has met an overflow."""
    _sharing.add(session)


def current() -> Tensor | None:
    """What the loss is multiplied by now, a scalar, or None: no scaler is in use, or nobody can know which one."""
    scales = [scaler._scale for scaler in list(_scalers) if scaler.is_enabled() and scaler._scale is not None]
    if len(scales) > 1:
        _say_once()
        return None
    return scales[0] if scales else None


def in_use() -> bool:
    """Whether a scaler is: it looks for values that are not finite, and skips steps, by itself."""
    return any(scaler.is_enabled() and scaler._scale is not None for scaler in list(_scalers))


@functools.cache
def _say_once() -> None:
    warn("several GradScalers are in use: residuals are in units of the scaled loss, and change with the scale")
