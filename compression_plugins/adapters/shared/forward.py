"""When a model computes gradients, seen from its modules: step hooks act on parameters just then."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

from ...engine.session import Session


def watch(session: Session, parameters: Iterable[Tensor]) -> None:
    """Tell `session` when a module that owns one of `parameters` begins a forward pass with gradients.

    For hosts that know parameters and no model. A pass without gradients, an evaluation, sees exact parameters, and so
    does `state_dict()` of a module that has been seen.
    """
    known = {id(p) for p in parameters}
    seen: weakref.WeakSet[nn.Module] = weakref.WeakSet()
    mine = weakref.ref(session)

    def begins(module: nn.Module, *_: Any) -> None:
        owner = mine()
        if owner is None or not any(id(p) in known for p in module._parameters.values()):
            return
        if module not in seen:
            seen.add(module)
            module.register_state_dict_pre_hook(_becomes_exact(mine))
        if torch.is_grad_enabled() and module.training:
            owner.before_forward()
        else:
            owner.after_backward()

    handle = register_module_forward_pre_hook(begins)
    weakref.finalize(session, handle.remove)


def after_this_backward(session: Session) -> None:
    """Tell `session` when the backward pass that is running now is over. To be called from a gradient's hook."""
    torch.autograd.Variable._execution_engine.queue_callback(session.after_backward)


def _becomes_exact(session: weakref.ref[Session]) -> Any:
    def before_state_dict(*_: Any) -> None:
        owner = session()
        if owner is not None:
            owner.after_backward()

    return before_state_dict
