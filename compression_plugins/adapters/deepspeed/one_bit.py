"""`optimizer.type` OneBitAdam, OneBitLamb, ZeroOneAdam, which DeepSpeed had until 0.18: an old config runs unchanged.

They compress what changes their moments, not gradients, so no rank may shard them: ZeRO stage 0, as it always was. The
engine averages gradients only in their dense steps (`engine.enable_backward_allreduce`); a block in the config says how
the rest travels, signs in two stages by default.

Why an old config runs by itself where a block is needed otherwise: without this package these words are an error, so
they can mean nothing else.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

from ...config import Config
from ...engine.notice import announce
from ...errors import ConfigError, UnsupportedError, nearest
from .config import BLOCK

if TYPE_CHECKING:
    from torch import Tensor

    from ...optimizer.one_bit import OneBit
    from .session import DeepSpeedSession

#: `optimizer.type` in lower case -> our class.
NAMES = {"onebitadam": "OneBitAdam", "onebitlamb": "OneBitLamb", "zerooneadam": "ZeroOneAdam"}
#: Parameters of DeepSpeed's that chose between its own ways to send.
_OF_ITS_BACKENDS = ("cuda_aware", "comm_backend_name")
_BLOCK = {"scheme": "ef_signsgd", "stages": 2}


def name_of(config: Any) -> str | None:
    """The class that `optimizer.type` of a `DeepSpeedConfig` selects, if it is one of these."""
    return NAMES.get(str(config.optimizer_name).lower())


def read(config: Any, block: Config | None, given: bool) -> Config | None:
    """What an engine with `config`, a `DeepSpeedConfig`, compresses, and how.

    Args:
        block: the configuration in its block, None without one.
        given: whether there is a block.

    Raises:
        ConfigError, UnsupportedError: this optimizer cannot run so.
    """
    name = name_of(config)
    if name is None:
        return block
    config.optimizer_name = name.lower()  # as DeepSpeed had it
    stage = int(config.zero_config.stage)
    if stage:
        _refuse(
            name,
            f"it is not compatible with ZeRO stage {stage}, where a rank holds a part of the moments only",
            "set zero_optimization.stage to 0, or optimizer.type to Adam with "
            f'"{BLOCK}": {{"file": "transformer/safe"}}',
        )
    if config.float16_config.enabled:
        _refuse(
            name,
            "at ZeRO stage 0 DeepSpeed divides fp16 gradients by the loss scale but does not multiply the loss by it",
            'use "bf16": {"enabled": true} in place of fp16',
        )
    if given and block is None:
        _refuse(name, f"{BLOCK} says enabled: false", "set optimizer.type to Adam or Lamb, or remove the block")
    if block is None:
        return Config.load(_BLOCK)
    own = {"warmup_steps": 0, "every": 1, "direction": Config.load("none").direction}
    for key, default in own.items():
        if getattr(block, key) != default:
            _refuse(name, f"{BLOCK}.{key} is set, and the optimizer decides that itself", f"remove {key}")
    return block


def wrap_engine(cls: Any) -> None:
    """Let `DeepSpeedEngine` know the three names."""
    supported, configure = cls._is_supported_optimizer, cls._configure_basic_optimizer

    @functools.wraps(supported)
    def _is_supported_optimizer(self: Any, optimizer_name: str) -> bool:
        return str(optimizer_name).lower() in NAMES or supported(self, optimizer_name)

    @functools.wraps(configure)
    def _configure_basic_optimizer(self: Any, model_parameters: Any) -> Any:
        name = name_of(self._config)
        if name is None or "max_grad_norm" in (self.optimizer_params() or {}):  # which DeepSpeed refuses itself
            return configure(self, model_parameters)
        return _make(name, model_parameters, dict(self.optimizer_params() or {}), self.global_rank == 0)

    cls._is_supported_optimizer, cls._configure_basic_optimizer = _is_supported_optimizer, _configure_basic_optimizer


def _make(name: str, parameters: Any, options: dict[str, Any], speaks: bool) -> OneBit:
    import inspect

    from ...optimizer import one_bit

    cls = getattr(one_bit, name)
    known = [*inspect.signature(cls).parameters][1:]
    for key in options:
        if key not in (*known, *_OF_ITS_BACKENDS):
            raise ConfigError(f"optimizer.params of {name}: unknown key {key!r}{nearest(key, known)}")
    idle = [f"{key}: {options.pop(key)!r}" for key in _OF_ITS_BACKENDS if key in options]
    if idle and speaks:
        announce(f"DeepSpeed: {name}: {', '.join(idle)} is not needed: messages go by torch.distributed, as all others")
    if options.get("eps_inside_sqrt") and speaks:
        announce(f"DeepSpeed: {name}: eps_inside_sqrt is ignored, as it was by DeepSpeed; eps stands outside")
    return cls(parameters, **options)


def optimizer_of(engine: Any) -> OneBit | None:
    """The engine's optimizer, if it is one of these."""
    name = type(engine.basic_optimizer).__name__
    return engine.basic_optimizer if name in NAMES.values() and hasattr(engine.basic_optimizer, "bind") else None


def check(engine: Any) -> None:
    """Raise `UnsupportedError` for what only the built engine shows."""
    optimizer = optimizer_of(engine)
    if optimizer is None and name_of(engine._config) is not None:
        _refuse(
            str(name_of(engine._config)),
            "the script makes an optimizer of its own",
            "give deepspeed.initialize none, or remove optimizer from the config",
        )


def facts(engine: Any) -> dict[str, Any]:
    """What all ranks must have in common: when they send what."""
    optimizer = optimizer_of(engine)
    if optimizer is None:
        return {}
    keys = ("freeze_step", "var_freeze_step", "var_update_scaler", "local_step_scaler", "local_step_clipper")
    found = {key: getattr(optimizer, key) for key in keys if hasattr(optimizer, key)}
    return {"optimizer": {"type": type(optimizer).__name__, **found}}


def bind(session: DeepSpeedSession, optimizer: OneBit) -> str:
    """Let it average over the ranks of `session`; what is to be said of it at start-up."""
    session.dense_gradients = True
    optimizer.bind(_Ranks(session, _names(session, optimizer)))
    name = type(optimizer).__name__
    if name == "ZeroOneAdam":
        when = f"variance in dense steps until step {optimizer.var_freeze_step}, then local steps"  # type: ignore[attr-defined]
    else:
        when = f"dense for {optimizer.freeze_step} steps"  # type: ignore[attr-defined]
    return f", {name}: {when}; what follows is of a coded step"


def _names(session: DeepSpeedSession, optimizer: OneBit) -> dict[Tensor, str]:
    """Parameter of the optimizer, which may be an fp32 copy -> name."""
    outer = session.engine.optimizer
    groups = zip(getattr(outer, "fp16_groups", ()), getattr(outer, "fp32_groups", ()))
    copies = {id(copy): p for half, full in groups for p, copy in zip(half, full)}
    own = [p for group in optimizer.param_groups for p in group["params"]]
    return {p: session.names[id(copies.get(id(p), p))] for p in own}


class _Ranks:
    """The ranks as the optimizer sees them: the buckets of the session's plan, in fp32."""

    def __init__(self, session: DeepSpeedSession, names: Mapping[Tensor, str]) -> None:
        self._session, self._names = session, names
        self._fillings: dict[tuple[str, frozenset[str]], Any] = {}

    def mean(self, vectors: Mapping[Tensor, Tensor], role: Literal["gradient", "update"]) -> None:
        """See `optimizer.one_bit.Ranks`."""
        session = self._session
        planned = {segment.name for bucket in session.plan.buckets for segment in bucket.segments}
        named = {self._names[p]: vector for p, vector in vectors.items() if self._names[p] in planned}
        fillings = self._of(role, frozenset(named))
        try:
            for name in reversed(session.common.parameters):
                if name in named:
                    fillings.give(name, named[name])
            fillings.collect()
        except BaseException:
            session.reducer.abort()
            fillings.clear()
            raise

    def average_gradients(self, on: bool) -> None:
        """See there."""
        self._session.engine.enable_backward_allreduce = on

    def _of(self, role: Literal["gradient", "update"], names: frozenset[str]) -> Any:
        from ...engine.filling import Fillings
        from ...engine.plan import Plan

        found = self._fillings.get((role, names))
        if found is None:
            buckets = []
            for bucket in self._session.plan.buckets:
                segments = tuple(segment for segment in bucket.segments if segment.name in names)
                if segments:
                    buckets.append(replace(bucket, segments=segments, dtype="float32", role=role))
            found = self._fillings[role, names] = Fillings(Plan(tuple(buckets), ()), self._session.reducer)
        return found


def _refuse(name: str, reason: str, remedy: str) -> None:
    raise UnsupportedError(f"optimizer.type {name}: {reason}; {remedy}")
