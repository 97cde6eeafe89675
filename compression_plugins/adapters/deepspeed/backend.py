"""The communication backend of DeepSpeed, which compresses inside a scope."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from deepspeed.comm.torch import Noop, TorchBackend
from torch import Tensor

from ...errors import UnsupportedError

if TYPE_CHECKING:
    from .scope import Gathers, Scope


class CompressedBackend(TorchBackend):
    """`deepspeed.comm`'s backend. Outside a scope each method is the inherited one.

    Attributes:
        scope: the reduction of gradients that is running, of whichever engine; one runs at a time.
        gathering: the weights of the engine that takes its step now.
    """

    scope: Scope | None = None
    gathering: Gathers | None = None

    @classmethod
    def adopt(cls, backend: TorchBackend) -> CompressedBackend:
        """A backend on the process groups that `backend` has already initialized.

        Raises:
            UnsupportedError: DeepSpeed does not communicate by torch here.
        """
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

    @contextmanager
    def gather_codes(self, weights: Gathers | None) -> Iterator[None]:
        """Inside, all-gathers of the flat weights that `weights` knows carry codes."""
        self.gathering, before = weights, self.gathering
        try:
            yield
        finally:
            self.gathering = before

    def all_reduce(self, tensor: Tensor, op: Any = dist.ReduceOp.SUM, group: Any = None, async_op: bool = False) -> Any:
        scope = self.scope
        if scope is not None and scope.session.reduce(scope, tensor, self._reduce_op(op), group, None):
            return Noop() if async_op else None
        return super().all_reduce(tensor, op, group, async_op)

    def reduce(
        self, tensor: Tensor, dst: int, op: Any = dist.ReduceOp.SUM, group: Any = None, async_op: bool = False
    ) -> Any:
        scope = self.scope
        if scope is not None:
            owner = dist.get_group_rank(scope.session.group, dst)
            if scope.session.reduce(scope, tensor, self._reduce_op(op), group, owner):
                return Noop() if async_op else None
        return super().reduce(tensor, dst, op, group, async_op)

    def all_gather_into_tensor(
        self, output_tensor: Tensor, input_tensor: Tensor, group: Any = None, async_op: bool = False
    ) -> Any:
        if self.gathering is not None and not async_op and self.gathering.gather(output_tensor, input_tensor):
            return None
        return super().all_gather_into_tensor(output_tensor, input_tensor, group, async_op)
