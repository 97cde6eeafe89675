"""Horovod: `hvd.DistributedOptimizer` reduces gradients through a compression scheme.

`hvd.DistributedOptimizer` copies the attributes of `_DistributedOptimizer` into a new class each time it is called, and
its `synchronize()` calls a handle that is callable. Wrapping a few methods of that one class is therefore enough, for
scripts that name a compressor and for scripts that know nothing of it::

    optimizer = hvd.DistributedOptimizer(optimizer, named_parameters=..., compression=Compression.scalecom(ratio=100))
    horovodrun --compression scalecom -np 4 python train.py

Importing this module installs it; a launch with `--compression` imports it by itself. Optimizers that use a stock
compressor, or the scheme `none`, keep Horovod's own code.

What is kept from step to step (residuals) is this rank's own. It is not in `optimizer.state_dict()`, which Horovod
broadcasts from rank 0; `state_dict(optimizer)` and `load_state_dict(optimizer, state)` save and restore it, one file a rank.
"""

from __future__ import annotations

import functools
import inspect
import os
from typing import Any, ClassVar

import horovod
import torch
from horovod.torch import mpi_ops
from horovod.torch import optimizer as host
from horovod.torch.compression import Compressor, NoneCompressor
from torch import Tensor

from .. import registry
from ..config import Config, from_environment
from ..errors import UnsupportedError, nearest
from .horovod_session import Session, sessions
from .notice import announce

_ARGUMENTS = (
    "self params named_parameters compression backward_passes_per_step op gradient_predivide_factor groups "
    "sparse_as_dense process_set"
).split()


class SchemeCompressor(Compressor):
    """A compression scheme as a Horovod compressor, for `hvd.DistributedOptimizer(compression=...)`.

    It owns its collective and keeps memory for each parameter, which `hvd.allreduce(compression=...)` has no place for:
    there it raises instead of sending dense.

    Args:
        parameters: keys of the configuration, of the scheme or general (`ratio=100`, `exempt=["*.bias"]`).

    Raises:
        ConfigError: an unknown key or a wrong value.
    """

    scheme: ClassVar[str | None] = None

    def __init__(self, **parameters: Any) -> None:
        self.config = Config.load(self.scheme, parameters) if self.scheme else Config.load(parameters)

    def compress(self, tensor: Tensor) -> tuple[Tensor, Any]:  # type: ignore[override]
        raise UnsupportedError(
            f"compression {self.config.scheme.name!r} keeps memory for each parameter and owns its collective, so plain "
            "Horovod operations cannot use it; pass it to hvd.DistributedOptimizer(compression=...)"
        )

    def decompress(self, tensor: Tensor, ctx: Any) -> Tensor:  # type: ignore[override]
        """What the reducer returned is the gradient already."""
        return tensor


class _Namespace:
    """`Compression.<scheme>(key=value, ...)` for every registered scheme, `Compression.load(source, ...)` for a file.

    `Compression.none` is Horovod's own, so this replaces `hvd.Compression` in a script.
    """

    none = NoneCompressor

    def __getattr__(self, name: str) -> type[SchemeCompressor]:
        if name.startswith("__") or name not in registry.names():
            raise AttributeError(f"Compression has no scheme {name!r}{nearest(name, registry.names())}")
        cls = type(name, (SchemeCompressor,), {"scheme": name, "__doc__": registry.get(name).__doc__})
        setattr(self, name, cls)
        return cls

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *registry.names()})

    @staticmethod
    def load(source: Any, **overrides: Any) -> SchemeCompressor:
        """A compressor from the name of a scheme, the path of a YAML or JSON file, or a mapping."""
        return SchemeCompressor(**Config.load(source, overrides).to_dict())


Compression = _Namespace()


def state_dict(optimizer: Any) -> dict[str, Any]:
    """The compression memory of `optimizer` on this rank: save it beside the optimizer's own state, one file a rank."""
    return _session(optimizer).state_dict()


def load_state_dict(optimizer: Any, state: dict[str, Any]) -> None:
    """Restore what `state_dict` gave on this rank. Every rank must load its own state of the same step."""
    _session(optimizer).load_state_dict(state)


def _session(optimizer: Any) -> Session:
    session = getattr(optimizer, "_compression_session", None)
    if session is None:
        raise UnsupportedError("this optimizer is not a compressed hvd.DistributedOptimizer")
    return session


def install() -> None:
    """Wrap the seams of Horovod. Idempotent.

    Raises:
        UnsupportedError: this Horovod differs from the one that the seams were written for.
    """
    cls = host._DistributedOptimizer
    if hasattr(cls, "_compression_session"):
        return
    arguments = list(inspect.signature(cls.__init__).parameters)
    if arguments != _ARGUMENTS:
        raise UnsupportedError(f"horovod {horovod.__version__}: DistributedOptimizer takes {arguments}, not {_ARGUMENTS}")
    _unset_malformed_variables()
    cls._compression_session = None
    for wrapper in (_init, _allreduce_grad_async, _synchronize, _step, _zero_grad, _load_state_dict):
        name = "__init__" if wrapper is _init else wrapper.__name__.removeprefix("_") 
        setattr(cls, name, wrapper(getattr(cls, name)))
