"""One compressed engine: what DeepSpeed hands over, and what becomes of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ...engine import patterns
from ...engine.filling import Fillings
from ...engine.plan import Plan
from ...engine.reducer import Reducer
from ...engine.session import Session
from ...transports.torch_distributed import TorchDistributed
from ..shared.forward import begin_forward, withhold
from .config import wire_dtype
from .routes import Part, Router, in_wire_dtype, scatters
from .scope import Fetched, Gathers, Layout, Scope, mismatch


class DeepSpeedSession:
    """What one compressed engine owns.

    Attributes:
        engine: the `DeepSpeedEngine`.
        common: what every host's session has: plan, reducer, hooks, state.
        group, rank, size: the data-parallel ranks.
        names: `id(parameter)` -> name, of the module's parameters (the first name of a shared one).
        weights: the model side of the scheme where ranks hold partitions, or None.
        fetches: what ZeRO 3 gathers of the parameters, where that is compressed, or None.
        partitions: whether this is ZeRO 3, which partitions parameters and scatters all gradients.
        waiting: gradients on their way under ZeRO 3, and the slices that will hold this rank's part of their average.
        deferred: whether the reductions of ZeRO run beside backward, and their results are written when it is over.
        stepping: whether the optimizer takes its step now.
        dense_gradients: whether gradients are averaged exactly, for the optimizer compresses something else.
    """

    def __init__(self, engine: Any, common: Session, group: dist.ProcessGroup) -> None:
        self.engine, self.common, self.group = engine, common, group
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self.names = {id(p): name for name, p in engine.module.named_parameters()}
        self.deferred = self.stepping = self.dense_gradients = False
        self.partitions = bool(engine.zero_optimization_partition_weights())
        self.weights: Gathers | None = None
        self.fetches: Fetched | None = None
        self.waiting: list[tuple[list[Any], list[Tensor]]] = []
        self.wire = wire_dtype(engine)
        self.plan = in_wire_dtype(common.plan, self.wire)
        self._router: Router | None = None
        self._fillings: Fillings | None = None
        self._zeros: dict[str, Tensor] = {}
        self._free: list[Tensor] = []
        self._reduced = self._checked = False

    @property
    def reducer(self) -> Reducer:
        """What averages; its state is this rank's."""
        return self.common.reducer

    @property
    def plan(self) -> Plan:
        """Which tensor travels how, in the buckets that do."""
        return self.common.plan

    @plan.setter
    def plan(self, plan: Plan) -> None:
        self.common.plan, self._router, self._fillings = plan, None, None

    @property
    def scale(self) -> float:
        """Factor from the mean over ranks to what DeepSpeed's optimizer expects."""
        return 1.0 if self.engine.gradient_average else float(self.size)

    def start(self, hooks: bool) -> None:
        """Make the reducer and, with `hooks`, those step hooks that act on whole parameters."""
        self.common.start(TorchDistributed(self.group))
        if hooks:
            self.common.make_hooks()

    # -- stage 0

    def average(self, gradients: dict[str, Tensor], absent: Sequence[str]) -> None:
        """Replace gradients by their average over ranks, bucket by bucket of the plan.

        Args:
            gradients: by name; parameters that are not among them (frozen meanwhile) count as zeros.
            absent: names of those that this rank has not computed.
        """
        self._judge_patterns()
        known = {segment.name for bucket in self.plan.buckets for segment in bucket.segments}
        fresh = {n: p for n, p in self.engine.module.named_parameters() if n in gradients and n not in known}
        if fresh:  # unfrozen since
            self.common.extend(fresh)
            self.plan = in_wire_dtype(self.plan, self.wire)
        if self._fillings is None:
            self._fillings = Fillings(self.plan, self.reducer, self.scale)
        try:
            exact = self.dense_gradients
            for name in reversed(self.common.parameters):
                if name in gradients:
                    self._fillings.give(name, gradients[name], absent=name in absent, exact=exact)
                else:
                    self._fillings.give(name, self._nothing(name), absent=True, exact=exact)
            self._fillings.collect()
        except BaseException:
            self.abort()
            raise

    def _nothing(self, name: str) -> Tensor:
        zeros = self._zeros.get(name)
        if zeros is None:
            zeros = self._zeros[name] = torch.zeros_like(self.common.parameters[name], requires_grad=False)
        return zeros.zero_()

    # -- ZeRO 1 and 2

    def reduce(self, scope: Scope, tensor: Tensor, op: Any, group: Any, destination: int | None) -> bool:
        """Replace `tensor` by its sum over ranks, or promise that `settle` will. False: not a gradient's sum, the
        backend's turn.

        Args:
            destination: rank that alone needs the sum; None when the layout says who needs what.

        Raises:
            UnsupportedError: this is not the reduction that was announced.
        """
        if op != dist.ReduceOp.SUM or not tensor.is_floating_point():
            return False
        if (group if group is not None else dist.group.WORLD) is not self.group:
            raise mismatch("the reduction runs in another process group than the data-parallel one")
        self._judge_patterns()
        route = self.router.of(scope.layout, scope.taken, tensor.numel(), destination, tensor.device)
        scope.taken += tensor.numel()
        runs = tensor.view(-1).split(route.runs)
        for part in route.parts:
            self._start_sum(scope, part, [runs[i] for i in part.order])
        if self.deferred:
            tensor.zero_()  # nobody may take it for a result
        else:
            self.reducer.drain()
        return True

    @property
    def router(self) -> Router:
        """How buffers are cut."""
        if self._router is None:
            self._router = Router(self.plan, self.rank, self.size, self.partitions)
        return self._router

    def _start_sum(self, scope: Scope, part: Part, mine: list[Tensor]) -> None:
        """Reduce one part of a buffer of stage 1 or 2."""

        def done(average: Tensor, dense: bool, scale: float) -> None:
            # The average of what was handed in, times this, is what a host that waits expects in its buffer; or, if
            # deferred, the optimizer in its gradients.
            factor = self.size * scale / (1.0 if dense else scope.unit)
            if self.deferred:
                factor = self.scale * scale * (scope.unit if dense else 1.0)
            pieces = average.mul_(factor).split(part.lengths)
            if self.deferred:
                for i in part.kept:
                    self._write(part, i, pieces[i])
            elif part.kept:
                torch._foreach_copy_([mine[i] for i in part.kept], [pieces[i] for i in part.kept])

        self._start(part, mine, scope.unit, done)

    def _start(self, part: Part, mine: list[Tensor], unit: float, done: Callable[[Tensor, bool, float], None]) -> None:
        """Average one part over ranks: in units of the unscaled loss, of this rank's own gradients; or as it is.

        Args:
            unit: factor from `mine` to this rank's own gradients.
            done: called with the average, whether it is of `mine` as it was, and the loss scale that it lacks.
        """
        bucket = part.bucket
        dense = self.reducer.as_is(bucket)
        flat = self._vector(bucket.numel, getattr(torch, bucket.dtype) if dense else torch.float32, mine[0].device)
        torch._foreach_copy_(list(flat.split(part.lengths)), mine)
        scale = 1.0 if dense else loss_scale(self.engine)
        if not dense:
            flat.mul_(unit / scale)

        def there(average: Tensor) -> None:
            done(average, dense, scale)
            self._free.append(flat)

        shards = part.shards if scatters(self.reducer.scheme_of(bucket), self.partitions) else None
        self.reducer.start(bucket, flat, shards).then(there)

    def _write(self, part: Part, i: int, values: Tensor) -> None:
        """Put a result where the optimizer will look for it; what it has cleared it does not need."""
        piece = part.pieces[i]
        gradient = self.engine.optimizer.get_gradient_for_reduction(self.common.parameters[piece.name])
        if gradient is None:
            return
        whole = gradient.detach().contiguous()
        whole.view(-1)[piece.start : piece.start + piece.numel] = values
        if whole.data_ptr() != gradient.data_ptr():
            gradient.detach().copy_(whole)

    def _vector(self, numel: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """A flat vector, of those that were used before if possible: a CPU spends more on the page faults of fresh ones
        than most codecs on arithmetic.
        """
        for i, vector in enumerate(self._free):
            if (vector.numel(), vector.dtype, vector.device) == (numel, dtype, device):
                return self._free.pop(i)
        if len(self._free) > 2 * len(self.plan.buckets):
            self._free.clear()  # buffers of lengths that come no more
        return torch.empty(numel, dtype=dtype, device=device)

    # -- ZeRO 3

    def scatter(self, layout: Layout, gradients: list[Tensor], results: dict[str, Tensor]) -> None:
        """Average gradients over ranks; this rank's slices go to `results` now, or if `deferred` when they are there.

        Args:
            layout: the slices of the gradients, each with its owner.
            results: by name, this rank's slice of each gradient's average, to be written.
        """
        self._judge_patterns()
        wholes = {name: gradient.reshape(-1) for name, gradient in zip(results, gradients, strict=True)}
        numel = sum(piece.numel for piece in layout.pieces)
        route = self.router.of(layout, 0, numel, None, gradients[0].device)
        runs = [wholes[piece.name][piece.start : piece.start + piece.numel] for piece in layout.pieces]
        for part in route.parts:
            self._start_slices(part, [runs[i] for i in part.order], results)
        if not self.deferred:
            self.reducer.drain()

    def _start_slices(self, part: Part, mine: list[Tensor], results: dict[str, Tensor]) -> None:
        def done(average: Tensor, _: bool, scale: float) -> None:
            pieces = average.mul_(scale).split(part.lengths)
            for i in part.kept:
                results[part.pieces[i].name].copy_(pieces[i])

        self._start(part, mine, 1.0, done)

    def settle(self, boundary: bool) -> None:
        """Backward is over: wait for everything.

        Args:
            boundary: whether the optimizer's step is due.
        """
        self.reducer.drain()
        self.reducer.judge()
        self._reduced = boundary

    def begin(self, accumulates: bool) -> None:
        """ZeRO computes gradients again. Those of a step that was due and did not come are overwritten, unless it
        `accumulates` them.
        """
        if self._reduced and not accumulates:
            self.common.drop()
        self._reduced = False

    # -- around the step

    def _judge_patterns(self) -> None:
        if not self._checked:
            patterns.check(self.common.config)
            self._checked = True

    def abort(self) -> None:
        """Backward has failed."""
        self.reducer.abort()
        self.waiting.clear()
        if self._fillings is not None:
            self._fillings.clear()

    def dropped(self) -> None:
        """The script has thrown gradients away."""
        if not self.stepping:
            self.common.drop()

    @contextmanager
    def step(self) -> Iterator[None]:
        """Around the optimizer's step."""
        self.common.after_backward()
        if self.weights is not None:
            self.weights.begin_step()
        self.stepping = True
        optimizer = self.engine.optimizer
        withheld = self.common.ill and not hasattr(optimizer, "overflow")
        if withheld:  # a plain torch optimizer: others skip by themselves
            hook = optimizer.register_step_pre_hook(lambda stepping, *_: withhold(stepping))  # after clipping
            optimizer.overflow = True  # so that DeepSpeed counts the step as skipped
        try:
            yield
        finally:
            self.stepping = self._reduced = False
            if withheld:
                hook.remove()
                del optimizer.overflow
        self.common.end_step(bool(getattr(optimizer, "overflow", False)), getattr(optimizer, "optimizer", optimizer))

    def exact(self) -> AbstractContextManager[None]:
        """Inside, the module holds exact weights, whatever it computes with. Under ZeRO every rank enters together."""
        return self.common.exact()

    def state_dict(self) -> dict[str, Any]:
        """This rank's memory as of the last step."""
        return self.common.state_dict()

    def about_to_compute(self, module: torch.nn.Module) -> None:
        """The module is about to run forward: with the weights at which gradients are computed, or to be judged."""
        if self.weights is None:
            begin_forward(self.common, module)
        elif module.training and torch.is_grad_enabled():
            self.common.before_forward()
        else:
            self.about_to_be_read()

    def about_to_be_read(self) -> None:
        """The script looks at the weights."""
        self.common.before_read()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from it."""
        self._reduced = False
        self.common.load_state_dict(state)

    def reset(self) -> None:
        """Forget what is remembered; the step stays with DeepSpeed's count."""
        self._reduced = False
        self.common.forget(int(self.engine.global_steps - self.engine.skipped_steps))


def loss_scale(engine: Any) -> float:
    """What DeepSpeed multiplied the loss by."""
    return float(getattr(engine.optimizer, "loss_scale", 1.0))
