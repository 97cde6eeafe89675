"""The seams of DeepSpeed that the adapter relies on: where it reduces gradients, and of which parameters.

Line by line they are (DeepSpeed 0.19, see `tests/hosts/deepspeed/test_contract.py`):

======================  ===========================================================  ====================
stage                   method                                                       collective inside
======================  ===========================================================  ====================
0, and BF16_Optimizer   `engine.buffered_allreduce_fallback`, replaced               none
1, 2                    `optimizer.allreduce_and_scatter`                            all_reduce, of which a
                                                                                     rank uses its slices
1, 2 (other options)    `optimizer.allreduce_bucket`,                                all_reduce, or reduce
                        `optimizer.gradient_reduction_w_predivide`
======================  ===========================================================  ====================

Stages 1 and 2 are in `zero.py`, stage 3 is in `zero3.py` and `fetches.py`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from ...errors import UnsupportedError
from ..shared.forward import Notice, watch_parts

if TYPE_CHECKING:
    from torch import Tensor

    from .backend import CompressedBackend
    from .session import DeepSpeedSession

#: Methods that must exist, per object.
ENGINE_SEAMS = (
    "buffered_allreduce_fallback",
    "_get_gradients_for_reduction",
    "_backward_prologue",
    "_backward_epilogue",
    "backward",
    "zero_grad",
    "_take_model_step",
    "_save_checkpoint",
    "_load_checkpoint",
    "load_checkpoint",
)
ZERO_SEAMS = (
    "allreduce_and_scatter",
    "allreduce_bucket",
    "gradient_reduction_w_predivide",
    "reduce_ipg_grads",
    "get_gradient_for_reduction",
    "update_lp_params",
)


def check(obj: object, names: Iterable[str], version: str) -> None:
    """Raise `UnsupportedError` when a method that the adapter wraps does not exist."""
    for name in names:
        if not callable(getattr(obj, name, None)):
            raise UnsupportedError(
                f"communication_compression: DeepSpeed {version} has no {type(obj).__name__}.{name}; "
                "install a tested version (pip install deepspeed==0.19.8) or remove the block"
            )


def wrap(obj: object, method: str, make: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    """Replace `obj.method` by `make(original)`."""
    original = getattr(obj, method)
    setattr(obj, method, functools.wraps(original)(make(original)))


def after(obj: object, method: str, then: Callable[[], None]) -> None:
    """Call `then` whenever `obj.method` has returned."""

    def make(original: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            result = original(*args, **kwargs)
            then()
            return result

        return wrapped

    wrap(obj, method, make)


def before(obj: object, method: str, first: Callable[[], None]) -> None:
    """Call `first` whenever `obj.method` is called."""

    def make(original: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            first()
            return original(*args, **kwargs)

        return wrapped

    wrap(obj, method, make)


# ---------------------------------------------------------------- every stage


def follow_steps(session: DeepSpeedSession, backend: CompressedBackend) -> None:
    """Notice backward passes that end or fail, gradients that are dropped, and steps."""
    engine = session.engine

    def stepping(original: Callable[..., Any]) -> Callable[..., Any]:
        def _take_model_step(*args: Any, **kwargs: Any) -> Any:
            with session.step(), backend.gather_codes(session.weights):
                return original(*args, **kwargs)

        return _take_model_step

    def guarded(original: Callable[..., Any]) -> Callable[..., Any]:
        def backward(*args: Any, **kwargs: Any) -> Any:
            try:
                return original(*args, **kwargs)
            except BaseException:
                session.abort()
                raise

        return backward

    wrap(engine, "_take_model_step", stepping)
    wrap(engine, "backward", guarded)
    after(engine, "_backward_epilogue", session.common.after_backward)
    if session.fetches is not None:
        before(engine, "_backward_prologue", session.fetches.before_backward)


def follow_weights(session: DeepSpeedSession) -> None:
    """Where a scheme quantizes weights: notice what needs exact ones."""
    if not session.common.hooks:
        return
    engine, module = session.engine, session.engine.module
    module.register_forward_pre_hook(Notice(lambda: session.about_to_compute(module)))
    watch_parts(session.common, module, evaluations=session.weights is None)  # elsewhere all ranks come together
    if hasattr(engine, "save_16bit_model"):
        before(engine, "save_16bit_model", session.about_to_be_read)


# ---------------------------------------------------------------- stage 0 and BF16_Optimizer


def replace_reduction(session: DeepSpeedSession) -> None:
    """`engine.buffered_allreduce_fallback(grads=None)`: average all gradients. With BF16_Optimizer they are slices of
    the flat fp32 gradients of whole parameter groups.
    """
    engine = session.engine
    slices = _flat_gradients(session)

    def make(original: Callable[..., Any]) -> Callable[..., Any]:
        def buffered_allreduce_fallback(grads: Any = None, *args: Any, **kwargs: Any) -> Any:
            if grads is not None:
                return original(grads, *args, **kwargs)
            if slices:
                return session.average(slices, ())
            live = [(n, p) for n, p in engine.module.named_parameters() if p.requires_grad and p.numel()]
            absent = [name for name, p in live if p.grad is None]
            engine._get_gradients_for_reduction()  # which makes zeros where there are none
            return session.average({name: p.grad for name, p in live}, absent)

        return buffered_allreduce_fallback

    wrap(engine, "buffered_allreduce_fallback", make)
    after(engine, "zero_grad", session.dropped)
    after(engine.optimizer, "zero_grad", session.dropped)


def _flat_gradients(session: DeepSpeedSession) -> dict[str, Tensor]:
    """BF16_Optimizer: the slice of a flat gradient buffer that is each parameter's."""
    optimizer = session.engine.optimizer
    found = {}
    flats = getattr(optimizer, "fp32_groups_gradients_flat", ())
    for flat, group in zip(flats, getattr(optimizer, "bf16_groups", ()), strict=True):
        start = 0
        for p in group:
            if p.numel():
                found[session.names[id(p)]] = flat[start : start + p.numel()].view(p.shape)
            start += p.numel()
    return found
