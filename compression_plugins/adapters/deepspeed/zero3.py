"""The seams of ZeRO 3: DeepSpeedZeroOptimizer_Stage3 reduces a bucket of gradients and keeps a slice of each.

======================================  ==========================================================================
`__avg_scatter_grads`                   replaced: this rank's slice of the average of each gradient of a bucket
`__avg_scatter_contiguous_grads`        replaced by the same (`reduce_scatter: false`)
`partition_grads`                       adds the slices to those of the step; called when they are there
`__reduce_and_partition_ipg_grads`      at the end of backward, waits for all of them
======================================  ==========================================================================
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .scope import Layout, Piece
from .seams import after, wrap

if TYPE_CHECKING:
    from .session import DeepSpeedSession

_PRIVATE = "_DeepSpeedZeroOptimizer_Stage3__"
#: Methods that must exist.
ZERO3_SEAMS = (
    f"{_PRIVATE}avg_scatter_grads",
    f"{_PRIVATE}avg_scatter_contiguous_grads",
    f"{_PRIVATE}reduce_and_partition_ipg_grads",
    "partition_grads",
    "independent_gradient_partition_epilogue",
    "_partition_all_parameters",
    "zero_grad",
)


def stand_in(parameter: Any) -> Tensor:
    """A tensor of the shape, dtype and device of a parameter whose values lie elsewhere in slices; it has no memory of
    its own.
    """
    return torch.empty(1, dtype=parameter.dtype, device=parameter.device).expand(parameter.ds_shape)


def follow_zero3(session: DeepSpeedSession) -> None:
    """Reduce every bucket as the plan says. With `session.deferred` slices arrive beside backward."""
    optimizer = session.engine.optimizer
    layouts: dict[tuple[str, ...], Layout] = {}
    closing = False

    def layout_of(names: tuple[str, ...], params: list[Any]) -> Layout:
        """Parameter by parameter its slices, of which rank i owns the i-th."""
        layout = layouts.get(names)
        if layout is None:
            pieces = []
            for name, p in zip(names, params, strict=True):
                chunk = p.partition_numel()
                for owner in range(session.size):
                    start = owner * chunk
                    if start < p.ds_numel:
                        pieces.append(Piece(name, start, min(chunk, p.ds_numel - start), owner))
            layout = layouts[names] = Layout(names, tuple(pieces))
        return layout

    def averages(params: list[Any]) -> list[Tensor]:
        names = tuple(session.names[id(p)] for p in params)
        own = [max(0, min(p.partition_numel(), p.ds_numel - session.rank * p.partition_numel())) for p in params]
        results = [
            torch.empty(n, dtype=optimizer.gradient_accumulation_dtype, device=p.grad.device)
            for n, p in zip(own, params, strict=True)
        ]
        session.scatter(layout_of(names, params), [p.grad for p in params], dict(zip(names, results, strict=True)))
        return results

    def scattering(_: Callable[..., Any]) -> Callable[..., Any]:
        def __avg_scatter_grads(params: list[Any], communication_data_type: Any) -> list[Tensor]:
            return averages(params)

        return __avg_scatter_grads

    def scattering_contiguous(_: Callable[..., Any]) -> Callable[..., Any]:
        def __avg_scatter_contiguous_grads(buffer: Tensor, communication_data_type: Any) -> list[Tensor]:
            return averages(optimizer.ipg_buckets[communication_data_type].params)

        return __avg_scatter_contiguous_grads

    def adding(original: Callable[..., Any]) -> Callable[..., Any]:
        def partition_grads(params: list[Any], slices: list[Tensor]) -> Any:
            if not session.deferred:
                return original(params, slices)
            session.waiting.append((list(params), slices))
            for p in params:
                p.grad = None
            return None

        partition_grads.now = original  # type: ignore[attr-defined]
        return partition_grads

    def reducing(original: Callable[..., Any]) -> Callable[..., Any]:
        def __reduce_and_partition_ipg_grads(communication_data_type: Any) -> None:
            original(communication_data_type)
            if closing:
                with _reduction_stream(optimizer):
                    session.settle(False)
                    for params, slices in session.waiting:
                        optimizer.partition_grads.now(params, slices)
                session.waiting.clear()

        return __reduce_and_partition_ipg_grads

    def ending(original: Callable[..., Any]) -> Callable[..., Any]:
        def independent_gradient_partition_epilogue(*args: Any, **kwargs: Any) -> Any:
            nonlocal closing
            closing = True
            try:
                return original(*args, **kwargs)
            except BaseException:
                session.abort()
                raise
            finally:
                closing = False
                session.waiting.clear()

        return independent_gradient_partition_epilogue

    wrap(optimizer, f"{_PRIVATE}avg_scatter_grads", scattering)
    wrap(optimizer, f"{_PRIVATE}avg_scatter_contiguous_grads", scattering_contiguous)
    wrap(optimizer, f"{_PRIVATE}reduce_and_partition_ipg_grads", reducing)
    wrap(optimizer, "partition_grads", adding)
    wrap(optimizer, "independent_gradient_partition_epilogue", ending)
    after(optimizer, "zero_grad", session.dropped)


def _reduction_stream(optimizer: Any) -> Any:
    from deepspeed.accelerator import get_accelerator

    return get_accelerator().stream(optimizer.reduce_and_partition_stream)
