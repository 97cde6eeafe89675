"""When a model computes gradients, seen from its modules: step hooks act on parameters just then."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

from ...engine.session import Session


def begin_forward(session: Session, module: nn.Module) -> None:
    """Tell `session` that `module` begins a forward pass: one that trains, with or without its training mode, or an
    evaluation: no gradients, and not in training mode. (A module in training mode may run without gradients inside of a
    pass that trains: checkpointed activations.)
    """
    if torch.is_grad_enabled():
        session.before_forward() if module.training else session.after_backward()
    elif not module.training:
        session.before_read()


def watch(session: Session, parameters: Iterable[Tensor]) -> None:
    """Tell `session` when a module that owns one of `parameters` begins a forward pass with gradients.

    For hosts that know parameters and no model. An evaluation sees the parameters by which the job is judged, and so
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
        begin_forward(owner, module)

    handle = register_module_forward_pre_hook(begins)
    weakref.finalize(session, handle.remove)


def after_this_backward(session: Session) -> None:
    """Tell `session` when the backward pass that is running now is over. To be called from a gradient's hook."""
    torch.autograd.Variable._execution_engine.queue_callback(session.after_backward)


def _becomes_exact(session: weakref.ref[Session]) -> Any:
    def before_state_dict(*_: Any) -> None:
        owner = session()
        if owner is not None:
            owner.before_read()

    return before_state_dict
