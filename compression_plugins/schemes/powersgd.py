"""PowerSGD: low-rank gradients."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, ClassVar

from pydantic import Field

from .._lazy import torch
from ..core.call import Call, Program, Reduction, Segment
from ..core.memory import ERROR_FEEDBACK, Memory, finite, nan_unless, zero_unless
from .base import Scheme
from .registry import register

if TYPE_CHECKING:
    from torch import Tensor


_TINY = 2.0**-126  # smallest normal fp32
_STRIP = 1 << 18  # values that stay in the cache of a core from one operation to the next


@register
class PowerSGD(Scheme):
    """One step of power iteration, started from the last step's result: P = MQ, orthogonalize, Q = M^T P.

    Two all-reduces per bucket, of all its left and then all its right factors. A matrix for which rank (n + m) >= n m,
    and what is no matrix, travels dense beside the left factors. The memory is M minus the aggregated approximation.
    """

    name: ClassVar[str] = "powersgd"
    paper: ClassVar[str] = "Vogels et al., 2019, arXiv 1905.13727"
    suits_adam: ClassVar[bool] = False
    sums_only: ClassVar[bool] = True

    rank: Annotated[int, Field(ge=1, le=256)] = Field(2, description="rank of the approximation")

    @property
    def memory(self) -> Memory | None:
        return ERROR_FEEDBACK

    def mean(self, x: Tensor, call: Call) -> Reduction:
        residual = call.residual()
        healthy = finite(x)
        sizes = [segment.numel for segment in call.segments]
        shapes = [self._matrix(segment) for segment in call.segments]
        low = [i for i, shape in enumerate(shapes) if shape]
        dense = [i for i, shape in enumerate(shapes) if not shape]

        def matrices(flat: Tensor) -> list[Tensor]:
            return [part.view(shape or -1) for part, shape in zip(flat.split(sizes), shapes)]

        gradients, old = matrices(zero_unless(healthy, x)), matrices(residual.old)
        p = matrices(residual.new)  # gradient plus memory, until the update is known
        queries = {i: self._query(p[i], call, call.segments[i].name) for i in low}
        for i in dense:
            torch.add(old[i], gradients[i], out=p[i])

        alarm = torch.where(healthy, 0.0, torch.nan).view(1)  # a rank that is not healthy makes every sum NaN
        # Factors are rows here, (M Q)^T = Q^T M^T and (P^T M): BLAS reads a matrix for two thin rows at the speed of
        # memory, and takes four times as long for two thin columns.
        lefts, tail = yield from _mean(
            call,
            [_compensated_product(queries[i], old[i], gradients[i], p[i]) for i in low],
            [p[i] for i in dense] + [alarm],
        )
        *tail, alarm = tail
        healthy = alarm.isfinite()
        lefts = [_orthogonal(left.T) for left in lefts]
        rights, _ = yield from _mean(call, [left.T @ p[i] for i, left in zip(low, lefts)], [])

        outputs = matrices(x)
        for i, left, right in zip(low, lefts, rights):
            for rows in _strips(p[i]):
                _product(left[rows], right, outputs[i][rows])
                p[i][rows].sub_(zero_unless(healthy, outputs[i][rows]))
            unit = right / right.abs().amax().clamp_min(_TINY)  # only its span matters, and it must not overflow
            queries[i].copy_(unit.where(healthy & right.any(), queries[i]))
        for i, mean in zip(dense, tail):
            outputs[i].copy_(mean)
            p[i].sub_(zero_unless(healthy, mean))
        return nan_unless(healthy, x)

    def wire_bits(self, segments: Sequence[Segment], size: int) -> float:
        shapes = [self._matrix(segment) for segment in segments]
        sent = [self.rank * sum(shape) if shape else s.numel for shape, s in zip(shapes, segments)]
        return 64 * (sum(sent) + 1) * (size - 1) / size  # and one value that says whether all are finite

    def _matrix(self, segment: Segment) -> tuple[int, int] | None:
        """(rows, columns) of a tensor that two factors are smaller than, else None."""
        if segment.shape is None or len(segment.shape) < 2 or not segment.numel:
            return None
        rows = segment.shape[0]
        columns = segment.numel // rows
        return (rows, columns) if self.rank * (rows + columns) < rows * columns else None

    def _query(self, matrix: Tensor, call: Call, name: str) -> Tensor:
        """The right factor of the step before, [rank, columns]; at first random, the same on every rank."""

        def first() -> Tensor:
            generator = torch.Generator().manual_seed(zlib.crc32(f"{call.key.seed}/{name}".encode()))
            return torch.randn(self.rank, matrix.shape[1], generator=generator).to(matrix.device)

        return call.state.tensor("query", name, first)


def _mean(call: Call, first: list[Tensor], second: list[Tensor]) -> Program[tuple[list[Tensor], list[Tensor]]]:
    """All-reduce two lists of tensors as one message; their means."""
    tensors = first + second
    if not tensors:
        return [], []
    flat = yield call.transport.all_reduce(torch.cat([t.reshape(-1) for t in tensors]))
    flat.div_(call.transport.size)
    means = [piece.view_as(t) for piece, t in zip(flat.split([t.numel() for t in tensors]), tensors)]
    return means[: len(first)], means[len(first) :]


def _strips(matrix: Tensor) -> list[slice]:
    """Rows of a matrix that a CPU takes together through several operations; a GPU takes all."""
    rows, columns = matrix.shape
    some = max(1, _STRIP // columns) if matrix.is_cpu else rows
    return [slice(start, start + some) for start in range(0, rows, some)]


def _compensated_product(query: Tensor, old: Tensor, gradient: Tensor, out: Tensor) -> Tensor:
    """Writes old + gradient to `out` [rows, columns]; its left factor query @ out.T, [rank, rows]."""
    left = query.new_empty(len(query), len(out))
    for rows in _strips(out):
        torch.add(old[rows], gradient[rows], out=out[rows])
        torch.mm(query, out[rows].T, out=left[:, rows])
    return left


def _product(left: Tensor, right: Tensor, out: Tensor) -> None:
    """Writes left [rows, rank] @ right [rank, columns] to `out`."""
    if out.is_cpu and len(right) == 2:  # for which BLAS takes twice the time of these
        torch.mul(left[:, :1], right[:1], out=out).addcmul_(left[:, 1:], right[1:])
    else:
        torch.mm(left, right, out=out)


def _orthogonal(left: Tensor) -> Tensor:
    """Orthonormal basis of the columns, the same on every rank."""
    return torch.linalg.qr(torch.nan_to_num(left)).Q
