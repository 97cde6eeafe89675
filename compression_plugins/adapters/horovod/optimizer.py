"""Horovod: `hvd.DistributedOptimizer` reduces gradients through a compression scheme.

`hvd.DistributedOptimizer` copies the attributes of `_DistributedOptimizer` into a new class each time it is called, and
its `synchronize()` calls a handle that is callable. Wrapping a few methods of that one class is therefore enough, for
scripts that name a compressor and for scripts that know nothing of it::

    optimizer = hvd.DistributedOptimizer(optimizer, named_parameters=..., compression=Compression.scalecom(ratio=100))
    horovodrun --compression scalecom -np 4 python train.py

Importing this module installs it; a launch with `--compression` imports it by itself. Optimizers that use a stock
compressor, or the scheme `none` without a direction, keep Horovod's own code.

What is kept from step to step (residuals) is this rank's own. It is not in `optimizer.state_dict()`, which Horovod
broadcasts from rank 0: each rank saves and restores its own by `state_dict(optimizer)` and
`load_state_dict(optimizer, state)` of this module.
With a loss scaler, call `synchronize()` and `unscale_` as Horovod documents; residuals are kept in units of the
unscaled loss.
"""

from __future__ import annotations

import functools
import gc
import inspect
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import horovod
import torch
from horovod.torch import mpi_ops
from horovod.torch import optimizer as host
from horovod.torch.compression import Compressor, NoneCompressor
from torch import Tensor

from ...config import Config, from_environment
from ...engine.notice import announce
from ...errors import UnsupportedError, nearest
from ...schemes import registry
from . import elastic
from .session import HorovodSession, agree_on_steps, sessions

_CONSTRUCTOR = [
    *("self", "params", "named_parameters", "compression", "backward_passes_per_step", "op"),
    *("gradient_predivide_factor", "groups", "sparse_as_dense", "process_set"),
]


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

    def compress(self, tensor: Tensor) -> tuple[Tensor, Any]:
        raise UnsupportedError(
            f"compression {self.config.scheme.name!r} keeps memory for each parameter and owns its collective; plain "
            "Horovod operations cannot use it: pass it to hvd.DistributedOptimizer(compression=...)"
        )

    def decompress(self, tensor: Tensor, ctx: Any) -> Tensor:
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
    """The compression memory of `optimizer` on this rank; save it beside the optimizer's own state, a file per rank."""
    return _session(optimizer).state_dict()


def load_state_dict(optimizer: Any, state: Mapping[str, Any] | Sequence[Mapping[str, Any]]) -> None:
    """Continue, bit for bit, from what `state_dict` gave on this rank, after the weights are loaded; on every rank.

    In the next step ranks compare what they have; all continue, or all stop.

    Args:
        state: this rank's, or a list of all ranks' in rank order. From a list of another number of ranks each rank gets
            the mean of their memories. From {} memory begins at zero.

    Raises:
        MismatchError: on every rank, from the next step: a state is damaged, or of another rank or step.
    """
    _session(optimizer).load(lambda: state)


def save(optimizer: Any, folder: str | os.PathLike[str]) -> None:
    """Write `state_dict(optimizer)` of this rank to a file of its own in `folder`, which appears when all of it is on
    the disk; files of another number of ranks are removed. Call it on every rank.

    Raises:
        CompressionError: why it cannot be written; an older file is as it was.
    """
    _session(optimizer).save(folder)


def load(optimizer: Any, folder: str | os.PathLike[str]) -> None:
    """Continue from what `save` wrote into `folder`; on every rank, after the weights are loaded.

    As many ranks continue bit for bit, another number from the mean of their memories. Where there is nothing, memory
    starts at zero. Errors are those of `load_state_dict`.
    """
    _session(optimizer).load_folder(folder)


def finish(optimizer: Any) -> None:
    """Training is over: with `every` > 1, exchange what the last, partial round has learned, so that every rank holds
    the same weights. Call it on all ranks. Harmless otherwise.
    """
    _session(optimizer).finish(optimizer)


def _session(optimizer: Any) -> HorovodSession:
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
    missing = [name for name in (*_SEAMS, "_sparse_allreduce_grad_async") if not hasattr(cls, name)]
    if arguments != _CONSTRUCTOR or missing:
        raise UnsupportedError(
            f"horovod {horovod.__version__}: DistributedOptimizer differs from 0.28, for which this adapter is made: "
            f"constructor {arguments}, missing {missing}"
        )
    _unset_malformed_variables()
    elastic.install()
    cls._compression_session = None
    for name, wrapper in _SEAMS.items():
        setattr(cls, name, wrapper(getattr(cls, name)))
    adasum = host._DistributedAdasumOptimizer
    adasum.__init__ = _adasum_init(adasum.__init__)
    join = mpi_ops.join = _join(mpi_ops.join)
    if hasattr(sys.modules["horovod.torch"], "join"):  # not yet, while horovod.torch is being imported from elsewhere
        sys.modules["horovod.torch"].join = join  # type: ignore[attr-defined]


def _unset_malformed_variables() -> None:
    """`horovod.run()` exports `(None,)` (horovod/runner/__init__.py, a comma too many): a loop that spins, no cache."""
    for name in ("HOROVOD_CYCLE_TIME", "HOROVOD_CACHE_CAPACITY"):
        if os.environ.get(name) == "(None,)":
            del os.environ[name]
            announce(f"horovod: unset {name}='(None,)', which horovod.run() exported by mistake")


def _chosen(compression: Any) -> Any:
    """The compressor to use: the script's, unless it left Horovod's default and the launcher configured one."""
    configured = from_environment()
    if isinstance(compression, type) and issubclass(compression, SchemeCompressor):
        compression = compression()
    if configured is not None and compression is NoneCompressor:
        compression = SchemeCompressor(**configured.to_dict())
    elif configured is not None and mpi_ops.rank() == 0:
        name = compression.config.scheme.name if isinstance(compression, SchemeCompressor) else compression
        announce(f"horovod: the script's own compression={name} is used, not the launcher's {configured.scheme.name!r}")
    if isinstance(compression, SchemeCompressor):
        config = compression.config
        schemes = (config.scheme, *(rule.scheme for rule in config.rules))
        plain = config.every == 1 and not config.direction.formed and not config.watches
        if plain and all(scheme.host_dense for scheme in schemes):
            return NoneCompressor  # nothing to compress: Horovod's own path
    return compression


def _init(original: Callable[..., None]) -> Callable[..., None]:
    signature = inspect.signature(original)

    @functools.wraps(original)
    def __init__(*args: Any, **kwargs: Any) -> None:
        call = signature.bind(*args, **kwargs)
        call.apply_defaults()
        given = call.arguments
        compression = given["compression"] = _chosen(given["compression"])
        if not isinstance(compression, SchemeCompressor):
            return original(*call.args, **call.kwargs)
        if given["op"] not in (mpi_ops.Average, mpi_ops.Sum):
            why = f": {_ADASUM}" if given["op"] == mpi_ops.Adasum else ""
            raise UnsupportedError(f"horovod compression takes op=hvd.Average or hvd.Sum only{why}")
        if given["gradient_predivide_factor"] != 1.0:
            raise UnsupportedError(
                "horovod compression: gradient_predivide_factor scales before and after a dense sum; leave it at 1"
            )
        if given["groups"] is not None:
            given["groups"] = None
            if mpi_ops.rank() == 0:
                announce("horovod: groups= is replaced by the compression plan's buckets (bucket_mb)")
        original(*call.args, **call.kwargs)
        optimizer = given["self"]
        optimizer._compression_session = HorovodSession(compression.config, optimizer)
        if mpi_ops.size() == 1 and os.environ.get("HOROVOD_ELASTIC") != "1":
            kind = compression.config.direction.kind
            if compression.config.direction.formed:
                raise UnsupportedError(
                    f"horovod compression: on one rank nothing is reduced, so no direction: {kind} is formed: run on "
                    "two ranks, or use direction: gradient and let the script's optimizer have the moments"
                )
            announce("horovod: one rank only; nothing is communicated or compressed")

    return __init__


_ADASUM = "Adasum combines the optimizer's updates by their angles, which compressed ones do not keep"


def _adasum_init(original: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(original)
    def __init__(self: Any, params: Any, named_parameters: Any, compression: Any, *args: Any, **kwargs: Any) -> None:
        compression = _chosen(compression)
        if isinstance(compression, SchemeCompressor):
            raise UnsupportedError(f"horovod compression: {_ADASUM}; use op=hvd.Average or hvd.Sum, or no compression")
        original(self, params, named_parameters, compression, *args, **kwargs)

    return __init__


def _allreduce_grad_async(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def allreduce(self: Any, p: Tensor) -> tuple[Any, Any]:
        session: HorovodSession | None = self._compression_session
        if session is None:
            return original(self, p)
        absent = p.grad is None
        if absent:  # another rank may have one
            p.grad = torch.zeros_like(p)
        if session.takes(p):
            return session.submit(p, absent), None
        if p.grad is not None and not p.grad.is_sparse:
            p.grad = p.grad.to_sparse(1)
        return self._sparse_allreduce_grad_async(p, self._parameter_names[p])

    return allreduce


def _synchronize(original: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(original)
    def synchronize(self: Any) -> None:
        session: HorovodSession | None = self._compression_session
        if session is None or not session.included:
            return original(self)
        session.begin_synchronize()
        original(self)
        session.end_synchronize()
        session.withhold()

    return synchronize


def _step(original: Callable[..., Any]) -> Callable[..., Any]:
    """A step of the optimizer ends the step of compression."""

    @functools.wraps(original)
    def step(self: Any, closure: Any = None) -> Any:
        session: HorovodSession | None = self._compression_session
        if session is None:
            return original(self, closure)
        session.after_backward()
        with session.stepping(self):
            loss = original(self, closure)
        session.stepped(self)
        return loss

    return step


def _zero_grad(original: Callable[..., None]) -> Callable[..., None]:
    """Drops gradients that no step was made with. Takes torch's `set_to_none`, which Horovod's own does not."""

    @functools.wraps(original)
    def zero_grad(self: Any, *args: Any, **kwargs: Any) -> None:
        if self._compression_session is None:
            return original(self, *args, **kwargs)
        if self._handles:
            return original(self)  # raises
        self._compression_session.drop()
        return super(self.__class__, self).zero_grad(*args, **kwargs)

    return zero_grad


def _load_state_dict(original: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(original)
    def load(self: Any, *args: Any, **kwargs: Any) -> None:
        if self._compression_session is not None:
            self._compression_session.abort()
        original(self, *args, **kwargs)

    return load


def _join(original: Callable[..., int]) -> Callable[..., int]:
    @functools.wraps(original)
    def join(*args: Any, **kwargs: Any) -> int:
        gc.collect()  # optimizers that nobody holds any more have no part in this
        live = sorted((session for session in sessions if session.included), key=lambda session: session.name)
        for session in live:
            session.prepare_join()
        last = original(*args, **kwargs)
        if live:
            agree_on_steps(live)
        return last

    return join


_SEAMS: dict[str, Callable[[Callable[..., Any]], Callable[..., Any]]] = {
    "__init__": _init,
    "_allreduce_grad_async": _allreduce_grad_async,
    "synchronize": _synchronize,
    "step": _step,
    "zero_grad": _zero_grad,
    "load_state_dict": _load_state_dict,
}

install()
