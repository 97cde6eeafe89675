"""The seams of DeepSpeed that the adapter relies on: where it reduces gradients, and of which parameters.

A *marker* is a pass-through wrapper on one instance method. While that method runs, a `Scope` says "the collective you
are about to see is the reduction of these pieces of these parameters"; everything outside a scope stays exact.
Line by line the seams are (DeepSpeed 0.19, see `tests/hosts/deepspeed/test_contract.py`):

======================  ===========================================================  ====================
stage                   marker                                                       collective inside
======================  ===========================================================  ====================
0, and BF16_Optimizer   `engine.allreduce_bucket`                                    all_reduce
1, 2                    `optimizer.allreduce_and_scatter`                            all_reduce, of which a
                                                                                     rank uses its slices
1, 2 (other options)    `optimizer.allreduce_bucket`,                                all_reduce, or reduce
                        `optimizer.gradient_reduction_w_predivide`
======================  ===========================================================  ====================
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

from ...errors import UnsupportedError

if TYPE_CHECKING:
    from torch import Tensor

    from .session import Session

#: Methods that must exist, per object.
ENGINE_SEAMS = ("allreduce_bucket", "_take_model_step", "_save_checkpoint", "_load_checkpoint", "load_checkpoint")
ZERO_SEAMS = ("allreduce_and_scatter", "allreduce_bucket", "gradient_reduction_w_predivide", "update_lp_params")


class Piece(NamedTuple):
    """`numel` elements of parameter `name` from `start`; `owner` is the rank that needs them, None when all do.

    `name` is None for padding that belongs to no parameter.
    """

    name: str | None
    start: int
    numel: int
    owner: int | None = None


class Layout(NamedTuple):
    """What lies in the buffers of one reduction, in order. `key` identifies it; equal keys mean equal pieces."""

    key: tuple[Any, ...]
    pieces: tuple[Piece, ...]


class Scope:
    """One reduction of gradients in progress.

    Attributes:
        layout: the pieces of all the buffers that will be reduced inside.
        unit: factor from a buffer to this rank's own gradient; DeepSpeed may have divided by the world size.
        taken: elements of the layout that collectives have consumed so far.
    """

    def __init__(self, session: Session, layout: Layout, unit: float) -> None:
        self.session, self.layout, self.unit, self.taken = session, layout, unit, 0


def check(obj: object, names: Iterable[str], version: str) -> None:
    """Raise `UnsupportedError` when a method that the adapter wraps does not exist."""
    for name in names:
        if not callable(getattr(obj, name, None)):
            raise UnsupportedError(
                f"communication_compression: DeepSpeed {version} has no {type(obj).__name__}.{name}; "
                "install a tested version (pip install deepspeed==0.19.8) or remove the block"
            )


def mark(obj: object, method: str, session: Session, describe: Callable[..., tuple[Layout, float]]) -> None:
    """Wrap `obj.method` so that it runs inside the scope that `describe(*args, **kwargs)` gives; the outermost wins."""
    original = getattr(obj, method)

    @functools.wraps(original)
    def marked(*args: Any, **kwargs: Any) -> Any:
        if session.scope is not None:
            return original(*args, **kwargs)
        layout, unit = describe(*args, **kwargs)
        session.open(Scope(session, layout, unit))
        try:
            result = original(*args, **kwargs)
        except BaseException:
            session.close(failed=True)
            raise
        session.close()
        return result

    setattr(obj, method, marked)


# ---------------------------------------------------------------- stage 0 and BF16_Optimizer


def mark_engine(session: Session) -> None:
    """`engine.allreduce_bucket(bucket, dp_group, dp_world_size)`: `bucket` lists gradients of whole parameters, or the
    flat fp32 gradients of whole parameter groups (BF16_Optimizer)."""
    engine = session.engine
    parameters = list(engine.module.named_parameters())
    layouts: dict[tuple[int, ...], Layout] = {}
    groups = _flat_groups(session)

    def describe(bucket: list[Tensor], *_: Any, **__: Any) -> tuple[Layout, float]:
        if groups:
            owners = {flat.data_ptr(): i for i, (flat, _) in enumerate(groups)}
        else:
            owners = {p.grad.data_ptr(): i for i, (_, p) in enumerate(parameters) if p.grad is not None}
        indices = tuple(owners.get(t.data_ptr(), -1) for t in bucket)
        if -1 in indices:
            raise session.mismatch("engine.allreduce_bucket got a gradient that belongs to no parameter of the module")
        layout = layouts.get(indices)
        if layout is None:
            if groups:
                pieces = tuple(piece for i in indices for piece in groups[i][1])
            else:
                pieces = tuple(Piece(parameters[i][0], 0, parameters[i][1].numel()) for i in indices)
            layout = layouts[indices] = Layout(("engine", indices), pieces)
        return layout, unit()

    def unit() -> float:
        if not engine.gradient_average:
            return 1.0
        return float(engine.gradient_predivide_factor() if engine.postscale_gradients() else session.size)

    mark(engine, "allreduce_bucket", session, describe)


def _flat_groups(session: Session) -> list[tuple[Tensor, tuple[Piece, ...]]]:
    """BF16_Optimizer: flat gradient buffer of each parameter group, and its pieces with the padding at the end."""
    optimizer = session.engine.optimizer
    found = []
    flats = getattr(optimizer, "fp32_groups_gradients_flat", ())
    for flat, group in zip(flats, getattr(optimizer, "bf16_groups", ()), strict=True):
        pieces = [Piece(session.names[id(p)], 0, p.numel()) for p in group]
        padding = flat.numel() - sum(piece.numel for piece in pieces)
        found.append((flat, (*pieces, Piece(None, 0, padding)) if padding else tuple(pieces)))
    return found


# ---------------------------------------------------------------- ZeRO 1 and 2


def mark_zero(session: Session) -> None:
    """DeepSpeedZeroOptimizer: gradients gather in `ipg_buckets[dtype]`, are reduced, and each rank keeps its slices."""
    optimizer = session.engine.optimizer
    layouts: dict[tuple[Any, ...], Layout] = {}

    def unit() -> float:
        return float(session.size) if optimizer.gradient_average else 1.0

    def layout_of(bucket: Any, spans: tuple[tuple[int, int, int | None], ...]) -> Layout:
        """`spans`: (offset in the bucket, numel, owner) of each tensor to be reduced, in order."""
        key = (tuple(bucket.params), spans)
        layout = layouts.get(key)
        if layout is None:
            layout = layouts[key] = Layout(("zero", key), tuple(_cut(session, optimizer, bucket.params, spans)))
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

    mark(optimizer, "allreduce_and_scatter", session, scatter)
    mark(optimizer, "allreduce_bucket", session, tensors)
    mark(optimizer, "gradient_reduction_w_predivide", session, whole)


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


def _cut(session: Session, optimizer: Any, params: Any, spans: Any) -> Iterable[Piece]:
    """The pieces of the parameters that `spans` cover."""
    ends, total = [], 0
    for group, index, _ in params:
        parameter = optimizer.bit16_groups[group][index]
        ends.append((total, session.names[id(parameter)], parameter.numel()))
        total += parameter.numel()
    for offset, numel, owner in spans:
        if offset < 0 or offset + numel > total:
            raise session.mismatch(f"a gradient slice [{offset}, {offset + numel}) lies outside its bucket of {total}")
        for base, name, size in ends:
            start, end = max(offset, base), min(offset + numel, base + size)
            if start < end:
                yield Piece(name, start - base, end - start, owner)
