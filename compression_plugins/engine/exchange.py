"""How local updates meet: the drift of the parameters through the schemes of the plan, with memories of its own."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from ..collectives import dense_mean
from ..config import Config
from ..optimizer.directions import GRADIENT
from .driver import Work
from .notice import warn
from .plan import Bucket, Plan
from .reducer import Reducer

if TYPE_CHECKING:
    from ..core.call import Call, Reduction

Vectors = Mapping[str, Tensor]
Around = Callable[["Reduction", "Call"], "Reduction"]
_VETOES = 3


class Owner(Protocol):
    """What an exchange needs of a session."""

    config: Config
    plan: Plan
    parameters: dict[str, Tensor]

    @property
    def started(self) -> bool: ...

    @property
    def reducer(self) -> Reducer: ...


class UpdateExchange:
    """Averages over the ranks of a session; the `Exchange` of its `LocalUpdates`.

    Updates travel in the buckets of gradients under the role "update": in fp32 where nothing compresses them, or fp64.
    """

    def __init__(self, session: Owner) -> None:
        self._session: Owner = weakref.proxy(session)  # which holds us
        self._under_way: list[tuple[Bucket, Vectors, Work[Tensor]]] = []
        self._vetoed, self._veto, self._vetoes = False, "", 0

    def local(self) -> bool:
        """Whether ranks train by themselves in this step."""
        session = self._session
        return session.reducer.local if session.started else not session.config.warmup_steps

    def due(self) -> bool:
        """Whether a round ends with this step."""
        return self._session.reducer.round_ends

    def names(self) -> Sequence[str]:
        """Parameters of the plan."""
        return [row.name for row in self._session.plan.rows]

    def start(self, drifts: Vectors, moments: Mapping[str, Vectors], veto: str) -> list[Work[Tensor]]:
        """Begin to replace `drifts` by what the schemes make of their mean, or where some rank has a veto by the mean
        of the parameters themselves; and each of `moments` by its mean. The works that do it.

        Args:
            veto: name of a parameter that the script has written to, or "".
        """
        self._vetoed, self._veto = False, veto
        for bucket in self._buckets(drifts):
            self._start(bucket, drifts, self._or_exactly(bucket))
        for key, vectors in moments.items():
            for bucket in self._buckets(vectors, f"{key}: "):
                self._start(bucket, {f"{key}: {name}": vector for name, vector in vectors.items()})
        return [work for _, _, work in self._under_way]

    def finish(self) -> bool:
        """Wait for it; False where some rank had a veto."""
        self._session.reducer.drain()
        under_way, self._under_way = self._under_way, []
        for bucket, vectors, work in under_way:
            pieces = work.result().split([segment.numel for segment in bucket.segments])
            for segment, piece in zip(bucket.segments, pieces):
                vector = vectors[segment.name]
                vector.copy_(piece.view(vector.shape))
        if self._vetoed:
            self._session.reducer.drop()
        self._vetoes = self._vetoes + 1 if self._vetoed else 0
        if self._vetoes == _VETOES and self._veto:
            warn(
                f"{_VETOES} exchanges in a row averaged the weights without compression: the script writes to them "
                f"between steps, to {self._veto!r} for one (a clamp, a mask, max_norm of an embedding)"
            )
        return not self._vetoed

    def _buckets(self, vectors: Vectors, prefix: str = "") -> list[Bucket]:
        """Those of the plan, as far as there are vectors for them. With a prefix their operations have other names."""
        found = []
        for bucket in self._session.plan.buckets:
            segments = tuple(s._replace(name=prefix + s.name) for s in bucket.segments if s.name in vectors)
            if segments:
                dtype = "float64" if bucket.dtype == "float64" else "float32"
                found.append(replace(bucket, segments=segments, dtype=dtype, role="update", direction=GRADIENT))
        return found

    def _start(self, bucket: Bucket, vectors: Vectors, around: Around | None = None) -> None:
        """Compressed, or without `around` exactly."""
        parameters = self._session.parameters
        frozen = frozenset(
            s.name for s in bucket.segments if s.name in parameters and not parameters[s.name].requires_grad
        )
        reducer = self._session.reducer
        work = reducer.start(bucket, _flat(bucket, vectors), absent=frozen, exact=around is None, around=around)
        self._under_way.append((bucket, vectors, work))

    def _or_exactly(self, bucket: Bucket) -> Around:
        """What the scheme makes of a bucket, unless some rank has a veto."""

        def around(program: Reduction, call: Call) -> Reduction:
            ballot = call.transport.all_reduce(torch.tensor([float(bool(self._veto))], device=bucket.device))
            result = yield from program
            if float((yield ballot)):
                self._vetoed = True
                result = yield from dense_mean(call, _flat(bucket, self._session.parameters))
            return result

        return around


def _flat(bucket: Bucket, vectors: Vectors) -> Tensor:
    """[bucket.numel] of the bucket's dtype, a copy."""
    dtype = getattr(torch, bucket.dtype)
    return torch.cat([vectors[segment.name].detach().to(dtype).reshape(-1) for segment in bucket.segments])
