"""Compression in DeepSpeed: a block `communication_compression` in the DeepSpeed config, scripts unmodified.

`install()` wraps two constructors (`DeepSpeedConfig`, `DeepSpeedEngine`) and the config loader, which then also reads
YAML. Without the block nothing else happens. With it an engine gets a session as `engine.communication_compression`;
on one rank, where there is nothing to send, None. The autoload entry point calls `install()`; where that is switched
off, `import compression_plugins.adapters.deepspeed` does. ZeRO stages 0, 1 and 2 are compressed; what is not supported
is refused at start-up with the remedy.
"""

from __future__ import annotations

import functools
import importlib.util
import sys
from typing import TYPE_CHECKING, Any

from ...config import Config
from . import one_bit
from .config import (
    BLOCK,
    parse,
    refuse_direction,
    refuse_engine,
    refuse_levels,
    refuse_local_steps,
    refuse_skips,
    wire_dtype,
)
from .reading import wrap_config, wrap_loader

if TYPE_CHECKING:
    from ...schemes.base import Scheme
    from .session import DeepSpeedSession

__all__ = ["BLOCK", "attach", "install", "parse"]
_HOST = "DeepSpeed"
_ABSENT = "compression-plugins is not installed there, its DeepSpeed config has no such block"
_ALONE = (
    "Under ZeRO the exact weights are gathered from all ranks: evaluate and save on every rank, use "
    "engine.save_16bit_model, or set weights: false"
)


def install() -> None:
    """Make DeepSpeed understand the block; `deepspeed.runtime.engine` must be importable. Idempotent."""
    import deepspeed.runtime.config as runtime_config
    import deepspeed.runtime.engine as runtime_engine
    import deepspeed.runtime.tensor_parallel.init_utils as init_utils

    if hasattr(runtime_config.DeepSpeedConfig.__init__, "__wrapped__"):
        return
    wrap_loader(init_utils)
    package: Any = sys.modules["deepspeed"]
    if hasattr(package, "load_ds_config"):  # imported by name already; otherwise deepspeed/__init__.py is yet to do so
        package.load_ds_config = init_utils.load_ds_config
    wrap_config(runtime_config.DeepSpeedConfig)
    one_bit.wrap_engine(runtime_engine.DeepSpeedEngine)
    _wrap_engine(runtime_engine.DeepSpeedEngine)


def _wrap_engine(cls: Any) -> None:
    original = cls.__init__

    @functools.wraps(original)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        config = getattr(self._config, "communication_compression", None)
        if config is not None:
            self.communication_compression = attach(self, config)

    save = cls._save_checkpoint

    @functools.wraps(save)
    def _save_checkpoint(self: Any, save_dir: str, tag: str, *args: Any, **kwargs: Any) -> Any:
        result = save(self, save_dir, tag, *args, **kwargs)
        if getattr(self, "communication_compression", None) is None:
            from .checkpoint import sweep

            sweep(save_dir, tag)
        return result

    cls.__init__, cls._save_checkpoint = __init__, _save_checkpoint


def attach(engine: Any, config: Config) -> DeepSpeedSession | None:
    """Compress the gradient reductions of `engine`, on every rank; None, with a line that says so, on a single one.

    Raises:
        UnsupportedError: this engine cannot be compressed; the message says why and what to change.
        MismatchError: a rank has another configuration or model, or did not load the plugin.
    """
    import torch
    from deepspeed.comm import comm
    from torch.distributed.distributed_c10d import _get_default_store

    from ...engine.notice import announce
    from ...engine.session import Session
    from ..shared.store_handshake import handshake, meet
    from . import checkpoint, seams
    from .backend import CompressedBackend
    from .fetches import compressed_fetches
    from .session import DeepSpeedSession
    from .weights import gathered_weights
    from .zero import mark_zero
    from .zero3 import follow_zero3, stand_in

    refuse_engine(engine)
    one_bit.check(engine)
    refuse_local_steps(engine, config)
    refuse_levels(engine, config)
    refuse_skips(engine, config)
    rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    refuse_direction(engine, config, size)
    if size == 1:
        announce(f"{_HOST}: one rank sends nothing, so nothing is compressed")
        return None
    partitioned, zero3 = engine.zero_optimization(), engine.zero_optimization_partition_weights()
    zero = partitioned and not zero3 and hasattr(engine.optimizer, "ipg_buckets")
    _check_seams(engine, zero, zero3)

    named = [(name, p) for name, p in engine.module.named_parameters() if getattr(p, "ds_numel", p.numel())]
    trainable = {name: stand_in(p) if zero3 else p for name, p in named if p.requires_grad}
    frozen = [name for name, p in named if not p.requires_grad]
    common = Session(_HOST, config, trainable, frozen, speaks=rank == 0, gathers=partitioned)
    optimizer = one_bit.optimizer_of(engine)
    if optimizer is None:
        common.check_optimizer(engine.basic_optimizer)
    session = DeepSpeedSession(engine, common, engine.seq_data_parallel_group)
    if zero or zero3:
        _follow_zero(session)
    store = _get_default_store()
    facts = {**common.facts(), **_facts(engine), **one_bit.facts(engine), "tensors": common.tensors()}
    handshake(store, _HOST, common.name, rank, size, facts, _ABSENT)

    common.preload(session.rank, session.size, sharded=zero3 or (zero and _sharded(engine.optimizer)))
    backend = comm.cdb = CompressedBackend.adopt(comm.cdb)
    session.start(hooks=not partitioned)
    if engine.fp16_enabled():
        session.reducer.health.on = False  # DeepSpeed looks for overflows, and skips
    elif zero and config.on_nonfinite == "skip":
        engine.optimizer.check_grad_overflow = True
    meetings = iter(range(sys.maxsize))
    weights = gathered_weights(
        session,
        backend,
        lambda: meet(store, _HOST, f"{common.name}/exact/{next(meetings)}", rank, size, _ALONE),
    ) if partitioned and not zero3 else None  # fmt: skip
    if weights is not None:
        session.weights, common.hooks = weights, [weights]
    if zero3:
        session.fetches = compressed_fetches(session)
        follow_zero3(session)
    elif zero:
        mark_zero(session, backend)
    else:
        seams.replace_reduction(session)
    seams.follow_steps(session, backend)
    seams.follow_weights(session)
    checkpoint.follow(session)
    phases = one_bit.bind(session, optimizer) if optimizer is not None else ""
    common.announce(_where(session) + phases)
    whole = _wholly_averaged(session) if partitioned and rank == 0 else []
    if whole:
        announce(
            f"{_HOST}: {' and '.join(whole)}: every rank receives all of the average and keeps its part, 1/{size} of "
            "it; a reduce-scatter to the owners is not to be had"
        )
    if config.parameters is not None and rank == 0:
        announce(_of_weights(session, config.parameters))
    return session


def _check_seams(engine: Any, zero: bool, zero3: bool) -> None:
    import deepspeed

    from . import seams
    from .zero3 import ZERO3_SEAMS

    seams.check(engine, seams.ENGINE_SEAMS, deepspeed.__version__)
    if zero:
        seams.check(engine.optimizer, seams.ZERO_SEAMS, deepspeed.__version__)
    if zero3:
        seams.check(engine.optimizer, ZERO3_SEAMS, deepspeed.__version__)


def _facts(engine: Any) -> dict[str, Any]:
    """What decides messages, beside the configuration and the tensors."""
    import deepspeed
    import torch

    zero = engine._config.zero_config
    return {
        "versions": {"deepspeed": deepspeed.__version__, "torch": torch.__version__},
        "zero_optimization": {
            "stage": int(engine.zero_optimization_stage()),
            **{
                key: getattr(zero, key)
                for key in (
                    "reduce_bucket_size",
                    "contiguous_gradients",
                    "overlap_comm",
                    "reduce_scatter",
                    "round_robin_gradients",
                    "use_multi_rank_bucket_allreduce",
                    "param_persistence_threshold",
                    "prefetch_bucket_size",
                    "max_live_parameters",
                    "max_reuse_distance",
                )
            },
        },
        "communication_data_type": str(wire_dtype(engine)),
        "gradient_accumulation_steps": engine.gradient_accumulation_steps(),
        "gradient_clipping": engine.gradient_clipping(),
        "prescale_gradients": not engine.postscale_gradients(),
        "gradient_predivide_factor": engine.gradient_predivide_factor(),
    }


def _follow_zero(session: DeepSpeedSession) -> None:
    """Let ZeRO's buffers hold no more than a bucket of the plan, and the plan's buckets be what fills them."""
    from ...engine.plan import bucket_numel
    from .routes import as_host_fills
    from .zero import accumulates_in_fp32

    optimizer, common, zero3 = session.engine.optimizer, session.common, session.partitions
    limit = min(int(optimizer.reduce_bucket_size), bucket_numel(common.config, common.specs(common.parameters)))
    optimizer.reduce_bucket_size = limit
    every_micro_batch = zero3 or optimizer.partition_gradients
    hooked = every_micro_batch or optimizer.overlap_comm
    groups = optimizer.fp16_groups if zero3 else optimizer.bit16_groups
    names = [session.names[id(p)] for group in groups for p in group]
    names = [name for name in names if name in common.parameters]
    if hooked:  # gradients come in the order of backward
        reduced = set(names)
        names = [name for name in reversed(common.parameters) if name in reduced]
    session.plan = as_host_fills(session.plan, names, limit, zero3 or _sharded(optimizer), dense=zero3)
    if zero3:
        session.deferred = bool(session.engine._config.zero_config.overlap_comm)
    else:
        late = optimizer.cpu_offload or accumulates_in_fp32(optimizer)
        session.deferred = bool(optimizer.overlap_comm and not late)
    common.reductions = session.engine.gradient_accumulation_steps() if every_micro_batch else 1


def _sharded(optimizer: Any) -> bool:
    """Whether each slice of a buffer is reduced to its owner only."""
    return bool(optimizer.reduce_scatter and optimizer.contiguous_gradients)


def _of_weights(session: DeepSpeedSession, scheme: Scheme) -> str:
    """What the gather of weights sends, for the log at start-up."""
    from ...engine.plan import describe

    weights = f"{_HOST}: weights by {describe(scheme)}"
    if session.fetches is not None:
        coded, dense = (nbytes / 1e6 for nbytes in session.fetches.fetch_bytes())
        return f"{weights}, {coded:.3f} MB whenever all are fetched ({dense:.3f} MB as they are)"
    assert session.weights is not None
    sent, dense = session.weights.wire_bytes(), session.weights.dense_bytes() / 1e6
    cost = "as much as changes" if sent is None else f"{sent / 1e6:.3f} MB per step and rank"
    return f"{weights}, {cost} ({dense:.3f} MB as they are)"


def _wholly_averaged(session: DeepSpeedSession) -> list[str]:
    """Names of the schemes that average everything on every rank, where ZeRO needs a part."""
    buckets = [b for b in session.plan.buckets if not b.sharded and not b.scheme.host_dense]
    return sorted({bucket.scheme.name for bucket in buckets})


def _where(session: DeepSpeedSession) -> str:
    stage = int(session.engine.zero_optimization_stage())
    beside = ", beside backward" if session.deferred else ""
    times = session.common.reductions
    often = f", {times} times per step (every micro-batch)" if times > 1 else ""
    return f", ZeRO stage {stage}{beside}{often}"


if importlib.util.find_spec("deepspeed") is not None and "deepspeed.runtime.engine" not in sys.modules:
    import deepspeed.runtime.engine  # noqa: F401
if importlib.util.find_spec("deepspeed") is not None:
    install()
