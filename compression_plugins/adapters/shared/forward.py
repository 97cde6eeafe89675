"""When a model computes gradients, seen from its modules: step hooks act on parameters just then."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
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
    mine, read = weakref.ref(session), _reader(session)

    def begins(module: nn.Module, *_: Any) -> None:
        owner = mine()
        if owner is None or not any(id(p) in known for p in module._parameters.values()):
            return
        if module not in seen:
            seen.add(module)
            module.register_state_dict_pre_hook(Notice(read))
        begin_forward(owner, module)

    handle = register_module_forward_pre_hook(begins)
    weakref.finalize(session, handle.remove)


def after_this_backward(session: Session) -> None:
    """Tell `session` when the backward pass that is running now is over. To be called from a gradient's hook."""
    torch.autograd.Variable._execution_engine.queue_callback(session.after_backward)


def watch_parts(session: Session, module: nn.Module, evaluations: bool = True) -> None:
    """Tell `session` when `module` or a part of it is read by `state_dict()`, or by `evaluations` of its own."""
    read = _reader(session)
    for part in module.modules():
        part.register_state_dict_pre_hook(Notice(read))
        if evaluations and (part is module or not hasattr(module, "_orig_mod")):  # compiled ones stay in one piece
            part.register_forward_pre_hook(Notice(read, evaluations=True))


class Notice:
    """A hook of a module. Copies of the module, and what is pickled of it, have one that does nothing.

    Args:
        evaluations: only where there are no gradients and the module is not in training mode.
    """

    def __init__(self, then: Callable[[], None] | None = None, evaluations: bool = False) -> None:
        self._then, self._evaluations = then, evaluations

    def __call__(self, module: Any = None, *_: Any, **__: Any) -> None:
        if self._then is None or (self._evaluations and (torch.is_grad_enabled() or module.training)):
            return
        self._then()

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return Notice, ()


def _reader(session: Session) -> Callable[[], None]:
    """`session.before_read`, which does not keep the session alive, and which `torch.compile` leaves as it is.

    Not a decorated function of this module: `torch.compiler.disable` imports the compiler, which takes seconds, and
    `horovodrun` imports Horovod's adapter only to ask what Horovod was built with.
    """
    mine = weakref.ref(session)

    def read() -> None:
        owner = mine()
        if owner is not None:
            owner.before_read()

    return torch.compiler.disable(read)


def withhold(optimizer: Any) -> None:
    """Take all gradients from a torch optimizer that is about to step, so that it changes nothing: parameters without
    one keep their values, their moments and their counts.
    """
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = None
