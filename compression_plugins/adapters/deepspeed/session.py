"""The communication backend of DeepSpeed, compressing inside a scope, and the session that a scope belongs to."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from deepspeed.comm.torch import Noop, TorchBackend
from torch import Tensor

from ...core.call import Segment
from ...engine.plan import Bucket, Plan
from ...engine.reducer import Reducer
from ...errors import UnsupportedError
from ...schemes.base import Scheme
from .seams import Piece, Scope
from .weights import GatheredWeights, LocalWeights, weights_of

#: Elements at whose multiples vectors begin, so that kernels may load whole vectors of the processor.
_ALIGNMENT = 64
#: The reduction of gradients that is running in this process. A single name: one reduction runs at a time.
_active: Scope | None = None
#: The model side whose engine takes its step now.
_gathering: LocalWeights | GatheredWeights | None = None


class Part(NamedTuple):
    """The elements of a buffer that one scheme reduces together.

    Attributes:
        bucket: segments in the order of the flat vector that the reducer gets.
        order: indices of the buffer's runs, in that order.
        lengths: of these runs.
        shards: elements that each rank owns (reduce-scatter form), or None (all-reduce form).
        kept: positions in `order` of the runs whose result this rank needs.
    """

    bucket: Bucket
    order: tuple[int, ...]
    lengths: list[int]
    shards: list[int] | None
    kept: tuple[int, ...]


class Route(NamedTuple):
    """How one buffer is cut into runs, and what becomes of them.

    Attributes:
        whole: one scheme reduces the buffer as it lies, from end to end, and this rank needs all of the result.
    """

    runs: list[int]
    parts: tuple[Part, ...]
    whole: bool


class CompressedBackend(TorchBackend):
    """`deepspeed.comm`'s backend. Outside a scope each method is the inherited one."""

    @classmethod
    def adopt(cls, backend: TorchBackend) -> CompressedBackend:
        """A backend on the process groups that `backend` has already initialized."""
        if type(backend) is cls:
            return backend
        if not isinstance(backend, TorchBackend):
            raise UnsupportedError(
                f"communication_compression: DeepSpeed communicates by {type(backend).__name__}, not torch; "
                "remove the block, or run on an accelerator where it does"
            )
        adopted = cls.__new__(cls)
        adopted.__dict__.update(backend.__dict__)
        return adopted

    def all_reduce(self, tensor: Tensor, op: Any = dist.ReduceOp.SUM, group: Any = None, async_op: bool = False) -> Any:
        if _active is not None and _active.session.reduce(tensor, self._reduce_op(op), group, None):
            return Noop() if async_op else None
        return super().all_reduce(tensor, op, group, async_op)

    def reduce(
        self, tensor: Tensor, dst: int, op: Any = dist.ReduceOp.SUM, group: Any = None, async_op: bool = False
    ) -> Any:
        if _active is not None:
            owner = dist.get_group_rank(_active.session.group, dst)
            if _active.session.reduce(tensor, self._reduce_op(op), group, owner):
                return Noop() if async_op else None
        return super().reduce(tensor, dst, op, group, async_op)

    def all_gather_into_tensor(
        self, output_tensor: Tensor, input_tensor: Tensor, group: Any = None, async_op: bool = False
    ) -> Any:
        if _gathering is not None and not async_op and _gathering.gather(output_tensor, input_tensor):
            return None
        return super().all_gather_into_tensor(output_tensor, input_tensor, group, async_op)


class Session:
    """What one compressed engine owns: its reducer, its plan, and the routes of the buffers seen so far.

    Attributes:
        engine: the `DeepSpeedEngine`.
        group, rank, size: its data-parallel ranks.
        names: `id(parameter)` -> name, of the module's parameters (the first name of a shared one).
        reducer: owns the residuals, keyed by parameter name.
        weights: the model side of the scheme, or None.
        scope: the reduction of this engine that is running, or None.
    """

    def __init__(self, engine: Any, plan: Plan, reducer: Reducer, group: dist.ProcessGroup) -> None:
        self.engine, self.plan, self.reducer, self.group = engine, plan, reducer, group
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self.names = {id(p): name for name, p in engine.module.named_parameters()}
        self._segments = {s.name: (bucket.scheme, s) for bucket in plan.buckets for s in bucket.segments}
        self._routes: dict[tuple[Any, ...], Route] = {}
        self._memory = torch.empty(0)
        self.weights = weights_of(self)
        self.gradient_bytes = 0  # size of the reduced buffers, as DeepSpeed would have sent them, so far

    @property
    def scope(self) -> Scope | None:
        return _active

    def open(self, scope: Scope) -> None:
        global _active
        _active = scope

    def close(self, failed: bool = False) -> None:
        """End the scope; raise if the host did not reduce exactly what it had announced."""
        global _active
        scope, _active = _active, None
        if failed or scope is None:
            self.reducer.abort()
            return
        announced = sum(piece.numel for piece in scope.layout.pieces)
        if scope.taken != announced:
            raise self.mismatch(f"{announced} gradient elements were announced, {scope.taken} were reduced")

    def mismatch(self, what: str) -> UnsupportedError:
        """The error for a host that does not do what the seam says."""
        import deepspeed

        return UnsupportedError(
            f"communication_compression: DeepSpeed {deepspeed.__version__} does not reduce gradients the way this "
            f"adapter knows: {what}. Install a tested version (pip install deepspeed==0.19.8) or remove the block"
        )

    def reduce(self, tensor: Tensor, op: Any, group: Any, destination: int | None) -> bool:
        """Replace `tensor` by its sum over ranks, compressed. False: not a gradient's sum, the backend's turn.

        Args:
            destination: rank that alone needs the sum; None when the layout says who needs what.
        """
        scope = _active
        assert scope is not None
        if op != dist.ReduceOp.SUM or not tensor.is_floating_point():
            return False
        if (group if group is not None else dist.group.WORLD) is not self.group:
            raise self.mismatch("the reduction runs in another process group than the data-parallel one")
        route = self._route(scope, tensor.numel(), destination, tensor.device)
        scope.taken += tensor.numel()
        warming = self.reducer.step < self.reducer.config.warmup_steps
        schemes = [part.bucket.scheme.dense if warming else part.bucket.scheme for part in route.parts]
        if all(scheme.host_dense for scheme in schemes):
            return False  # DeepSpeed's own all-reduce, in its own dtype
        self.gradient_bytes += tensor.numel() * tensor.element_size()
        # The reducer works on this rank's own gradients, in units of the unscaled loss, and returns their average.
        unit = scope.unit / loss_scale(self.engine)
        if route.whole and tensor.dtype == torch.float32:
            flat, (part,) = tensor.view(-1), route.parts
            result = self.reducer.reduce(part.bucket, flat.mul_(unit), part.shards)
            torch.mul(result, self.size / unit, out=flat)
            return True
        runs = tensor.view(-1).split(route.runs)
        chosen = [[runs[i] for i in part.order] for part in route.parts]
        jobs = []
        for part, mine, flat in zip(route.parts, chosen, self._vectors(route.parts), strict=True):
            torch._foreach_copy_(list(flat.split(part.lengths)), mine)
            jobs.append(self.reducer.start(part.bucket, flat.mul_(unit), part.shards))
        for part, mine, job in zip(route.parts, chosen, jobs, strict=True):
            pieces = job.result().mul_(self.size / unit).split(part.lengths)
            if part.kept:
                torch._foreach_copy_([mine[i] for i in part.kept], [pieces[i] for i in part.kept])
        return True

    def _vectors(self, parts: Sequence[Part]) -> list[Tensor]:
        """A flat fp32 vector for every part, valid until the next reduction, which they share their memory with: a CPU
        spends more on the page faults of fresh ones than most codecs on arithmetic.
        """
        lengths = [-(-part.bucket.numel // _ALIGNMENT) * _ALIGNMENT for part in parts]
        device = torch.device(parts[0].bucket.device)
        if self._memory.device != device or self._memory.numel() < sum(lengths):
            self._memory = torch.empty(sum(lengths), dtype=torch.float32, device=device)
        vectors = self._memory[: sum(lengths)].split(lengths)
        return [vector[: part.bucket.numel] for vector, part in zip(vectors, parts)]

    def reset(self) -> None:
        """Forget residuals; the step stays with DeepSpeed's count."""
        empty = Reducer(self.reducer.config, self.reducer.transport).state_dict()
        self.reducer.load_state_dict({**empty, "step": int(self.engine.global_steps - self.engine.skipped_steps)})
        if self.weights is not None:
            self.weights.load_state_dict({})

    @contextmanager
    def gathering(self) -> Iterator[None]:
        """Inside, all-gathers of this engine's flat weights carry codes, if the scheme has a model side."""
        global _gathering
        _gathering = self.weights
        try:
            yield
        finally:
            _gathering = None

    def _route(self, scope: Scope, numel: int, destination: int | None, device: torch.device) -> Route:
        key = (scope.layout.key, scope.taken, numel, destination, device)
        route = self._routes.get(key)
        if route is None:
            pieces = self._take(scope, numel)
            if destination is not None and any(piece.owner != destination for piece in pieces):
                raise self.mismatch(f"a slice announced for another rank is reduced to rank {destination}")
            route = self._routes[key] = self._build(pieces, device)
        return route

    def _take(self, scope: Scope, numel: int) -> list[Piece]:
        """The announced pieces that make up the next `numel` elements."""
        pieces, position = [], 0
        for piece in scope.layout.pieces:
            if scope.taken <= position < scope.taken + numel:
                pieces.append(piece)
            position += piece.numel
        if sum(piece.numel for piece in pieces) != numel:
            raise self.mismatch(f"a buffer of {numel} elements is not made of the pieces announced for it")
        return pieces

    def _build(self, pieces: list[Piece], device: torch.device) -> Route:
        """Group the pieces by scheme; where ranks own them and the scheme can scatter, order them by owner."""
        groups: dict[Scheme, list[tuple[int, Piece]]] = {}
        for index, piece in enumerate(pieces):
            if piece.name is not None:
                if piece.name not in self._segments:
                    raise self.mismatch(f"parameter {piece.name!r} is reduced but was not there at start-up")
                groups.setdefault(self._segments[piece.name][0], []).append((index, piece))
        parts = []
        for scheme, members in groups.items():
            owned = all(piece.owner is not None for _, piece in members) and scatters(scheme)
            if owned:
                members = sorted(members, key=lambda member: member[1].owner)  # type: ignore[arg-type, return-value]
            bucket = Bucket(scheme, tuple(self._join([piece for _, piece in members], owned)), str(device))
            kept = tuple(i for i, (_, piece) in enumerate(members) if piece.owner in (None, self.rank))
            sizes = [sum(p.numel for _, p in members if p.owner == rank) for rank in range(self.size)]
            shards = sizes if owned else None
            parts.append(Part(bucket, tuple(i for i, _ in members), [p.numel for _, p in members], shards, kept))
        every = tuple(range(len(pieces)))
        whole = len(parts) == 1 and parts[0].order == parts[0].kept == every
        return Route([piece.numel for piece in pieces], tuple(parts), whole)

    def _join(self, pieces: list[Piece], owned: bool) -> list[Segment]:
        """Segments of a bucket. Without owners, consecutive slices of one parameter are one segment again."""
        segments: list[Segment] = []
        for piece in pieces:
            name, start, numel = piece.name or "", piece.start, piece.numel
            last = segments[-1] if segments else None
            if not owned and last is not None and last.name == name and last.start + last.numel == start:
                start, numel = last.start, last.numel + numel
                segments.pop()
            whole = self._segments[name][1]
            shape = whole.shape if (start, numel) == (0, whole.numel) else None
            segments.append(Segment(name, start, numel, shape))
        return segments


def scatters(scheme: Scheme) -> bool:
    """Whether `scheme` has a reduce-scatter form; one with a `reduce` of its own averages everything on every rank."""
    return type(scheme).reduce is Scheme.reduce


def loss_scale(engine: Any) -> float:
    """What DeepSpeed multiplied the loss by."""
    return float(getattr(engine.optimizer, "loss_scale", 1.0))
