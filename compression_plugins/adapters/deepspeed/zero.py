"""The seams of ZeRO 1 and 2: DeepSpeedZeroOptimizer collects gradients in `ipg_buckets` and reduces these.

A *marker*, a pass-through wrapper on a method of the optimizer, says while it runs "the collective you are about to see
is the reduction of these pieces of these parameters" (a `Scope`); everything outside a scope stays exact.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from .scope import Layout, Piece, Scope, mismatch
from .seams import before, wrap

if TYPE_CHECKING:
    from torch import Tensor

    from .backend import CompressedBackend
    from .session import DeepSpeedSession


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
