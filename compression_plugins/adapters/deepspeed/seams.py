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

At stages 1 and 2 a *marker*, a pass-through wrapper on the method, says while it runs "the collective you are about to
see is the reduction of these pieces of these parameters" (a `Scope`); everything outside a scope stays exact.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from ...errors import UnsupportedError
from .scope import Layout, Piece, Scope, mismatch

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


def follow_weights(session: DeepSpeedSession) -> None:
    """Where a scheme quantizes weights: notice what needs exact ones."""
    if not session.common.hooks:
        return
    engine, module = session.engine, session.engine.module
    module.register_forward_pre_hook(_Notice(lambda: session.about_to_compute(_trains(module))))
    for part in module.modules():
        part.register_state_dict_pre_hook(_Notice(session.about_to_be_read))
    if hasattr(engine, "save_16bit_model"):
        before(engine, "save_16bit_model", session.about_to_be_read)


def _trains(module: Any) -> bool:
    import torch

    return bool(module.training and torch.is_grad_enabled())


class _Notice:
    """A hook of a module. Copies of the module, and what is pickled of it, have one that does nothing."""

    def __init__(self, then: Callable[[], None] | None = None) -> None:
        self._then = then

    def __call__(self, *_: Any, **__: Any) -> None:
        if self._then is not None:
            self._then()

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return _Notice, ()


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


# ---------------------------------------------------------------- ZeRO 1 and 2


def mark_zero(session: DeepSpeedSession, backend: CompressedBackend) -> None:
    """DeepSpeedZeroOptimizer: gradients gather in `ipg_buckets[dtype]`, are reduced, and each rank keeps its slices."""
    engine, optimizer = session.engine, session.engine.optimizer
    layouts: dict[tuple[Any, ...], Layout] = {}

    def unit() -> float:
        return float(session.size) if optimizer.gradient_average else 1.0

    def layout_of(bucket: Any, spans: tuple[tuple[int, int, int | None], ...]) -> Layout:
        """`spans`: (offset in the bucket, numel, owner) of each tensor to be reduced, in order."""
        key = (tuple(bucket.params), spans)
        layout = layouts.get(key)
        if layout is None:
            layout = layouts[key] = Layout(key, tuple(_cut(session, optimizer, bucket.params, spans)))
        return layout

    def scatter(
        bucket: list[tuple[Any, ...]], communication_data_type: Any, *_: Any, **__: Any
    ) -> tuple[Layout, float]:
        ipg = optimizer.ipg_buckets[communication_data_type]
        locate = _locator(optimizer, ipg, communication_data_type)
        spans = tuple((locate(t), t.numel(), _owner(ranks)) for ranks, t, *_ in bucket)
        if any(owner is None for _, _, owner in spans):  # Muon needs whole matrices on several ranks: all get all
            spans = tuple((offset, numel, None) for offset, numel, _ in spans)
        return layout_of(ipg, spans), unit()

    def tensors(
        bucket: list[Tensor], communication_data_type: Any, rank: int | None = None, *_: Any, **__: Any
    ) -> tuple[Layout, float]:
        ipg = optimizer.ipg_buckets[communication_data_type]
        locate = _locator(optimizer, ipg, communication_data_type)
        spans = tuple((locate(t), t.numel(), rank) for t in bucket)
        return layout_of(ipg, spans), unit()

    def whole(tensor: Tensor, communication_data_type: Any) -> tuple[Layout, float]:
        layout, _ = tensors([tensor], communication_data_type)
        if not optimizer.gradient_average:
            return layout, 1.0
        return layout, float(optimizer.gradient_predivide_factor if optimizer.postscale_gradients else session.size)

    def settling(original: Callable[..., Any]) -> Callable[..., Any]:
        def reduce_ipg_grads(comm_dtype: Any = None) -> None:
            original(comm_dtype=comm_dtype)
            if comm_dtype is None:  # at the end of backward
                with _reduction_stream(optimizer):
                    session.settle(engine.is_gradient_accumulation_boundary())

        return reduce_ipg_grads

    _mark(optimizer, "allreduce_and_scatter", session, backend, scatter)
    _mark(optimizer, "allreduce_bucket", session, backend, tensors)
    _mark(optimizer, "gradient_reduction_w_predivide", session, backend, whole)
    wrap(optimizer, "reduce_ipg_grads", settling)
    before(engine, "_backward_prologue", lambda: session.begin(accumulates_in_fp32(optimizer)))


def accumulates_in_fp32(optimizer: Any) -> bool:
    """Whether reduced gradients are added to flat fp32 partitions at once, in the middle of backward."""
    return any(optimizer._use_compact_grad_partition_buffer(i) for i in range(len(optimizer.bit16_groups)))


def _mark(
    obj: object,
    method: str,
    session: DeepSpeedSession,
    backend: CompressedBackend,
    describe: Callable[..., tuple[Layout, float]],
) -> None:
    """Wrap `obj.method` so that it runs inside the scope that `describe(*args, **kwargs)` gives; the outermost wins."""

    def make(original: Callable[..., Any]) -> Callable[..., Any]:
        def marked(*args: Any, **kwargs: Any) -> Any:
            if backend.scope is not None:
                return original(*args, **kwargs)
            scope = backend.scope = Scope(session, *describe(*args, **kwargs))
            try:
                result = original(*args, **kwargs)
                scope.check()
            except BaseException:
                session.abort()
                raise
            finally:
                backend.scope = None
            return result

        return marked

    wrap(obj, method, make)


def _reduction_stream(optimizer: Any) -> Any:
    """Where what was started beside backward must go on; DeepSpeed then waits for it."""
    from deepspeed.accelerator import get_accelerator

    stream = optimizer.reduction_stream if optimizer.overlap_comm else get_accelerator().current_stream()
    return get_accelerator().stream(stream)


def _owner(ranks: Any) -> int | None:
    """DeepSpeed names the ranks that keep a slice by an int, or by a frozenset, of one member unless Muon is used."""
    if isinstance(ranks, frozenset):
        return next(iter(ranks)) if len(ranks) == 1 else None
    return int(ranks)


def _locator(optimizer: Any, bucket: Any, dtype: Any) -> Callable[[Tensor], int]:
    """Where a tensor starts, counted in elements over the parameters of `bucket` laid end to end; -1 if unknown."""
    if optimizer.contiguous_gradients:
        oversized = dtype in optimizer.extra_large_param_to_reduce  # bypasses the buffer, alone in its bucket
        base = (bucket.grads[0] if oversized else bucket.buffer[bucket.index]).data_ptr()
        return lambda tensor: (tensor.data_ptr() - base) // tensor.element_size()
    starts, total = {}, 0
    for gradient in bucket.grads:
        starts[gradient.data_ptr()] = total
        total += gradient.numel()
    return lambda tensor: starts.get(tensor.data_ptr(), -1)


def _cut(session: DeepSpeedSession, optimizer: Any, params: Any, spans: Any) -> Iterable[Piece]:
    """The pieces of the parameters that `spans` cover."""
    ends, total = [], 0
    for group, index, _ in params:
        parameter = optimizer.bit16_groups[group][index]
        ends.append((total, session.names[id(parameter)], parameter.numel()))
        total += parameter.numel()
    for offset, numel, owner in spans:
        if offset < 0 or offset + numel > total:
            raise mismatch(f"a gradient slice [{offset}, {offset + numel}) lies outside its bucket of {total}")
        for base, name, size in ends:
            start, end = max(offset, base), min(offset + numel, base + size)
            if start < end:
                yield Piece(name, start - base, end - start, owner)
