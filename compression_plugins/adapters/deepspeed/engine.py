"""Compression in DeepSpeed: a block `communication_compression` in the DeepSpeed config, scripts unmodified.

    "communication_compression": {"scheme": "scalecom", "ratio": 100}        # the keys of our YAML, inline
    "communication_compression": {"file": "configs/scalecom.yaml"}           # or a file, or the name of a scheme

`install()` wraps two constructors (`DeepSpeedConfig`, `DeepSpeedEngine`) and the config loader, which then also reads
YAML. Without the block nothing else happens. With it an engine gets a `Session` as `engine.communication_compression`.
The autoload entry point calls `install()`; where that is switched off, `import compression_plugins.adapters.deepspeed`
does. ZeRO stages 0, 1 and 2 are compressed; what is not supported is refused at start-up with the remedy.
"""

from __future__ import annotations

import functools
import importlib.util
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..._version import __version__
from ...config import Config, read_document
from ...errors import ConfigError, UnsupportedError

if TYPE_CHECKING:
    from .session import Session

BLOCK = "communication_compression"
_attached = 0  # engines so far; the same on every rank, so it names their handshakes


def install() -> None:
    """Make DeepSpeed understand the block; `deepspeed.runtime.engine` must be importable. Idempotent."""
    import deepspeed.runtime.config as runtime_config
    import deepspeed.runtime.engine as runtime_engine
    import deepspeed.runtime.tensor_parallel.init_utils as init_utils

    if hasattr(runtime_config.DeepSpeedConfig.__init__, "__wrapped__"):
        return
    _wrap_loader(init_utils)
    package: Any = sys.modules["deepspeed"]
    if hasattr(package, "load_ds_config"):  # imported by name already; otherwise deepspeed/__init__.py is yet to do so
        package.load_ds_config = init_utils.load_ds_config
    _wrap_config(runtime_config.DeepSpeedConfig)
    _wrap_engine(runtime_engine.DeepSpeedEngine)


def parse(block: Any) -> Config | None:
    """The configuration in a block; None when it says `"enabled": false`. Raises `ConfigError` for anything unknown."""
    if not isinstance(block, Mapping):
        raise ConfigError(
            f'{BLOCK} must be a mapping such as {{"scheme": "scalecom"}} or {{"file": "scalecom.yaml"}}, not {block!r}'
        )
    document = dict(block)
    enabled = document.pop("enabled", True)
    if not isinstance(enabled, bool):
        raise ConfigError(f"{BLOCK}: enabled must be true or false, not {enabled!r}")
    file = document.pop("file", None)
    if file is not None and not isinstance(file, str):
        raise ConfigError(f"{BLOCK}: file must be a path or the name of a scheme, not {file!r}")
    config = Config.load(document) if file is None else Config.load(file, document)
    return config if enabled else None


# ---------------------------------------------------------------- the config


def _is_yaml(config: Any) -> bool:
    return isinstance(config, (str, Path)) and str(config).lower().endswith((".yaml", ".yml"))


def _wrap_loader(module: Any) -> None:
    original = module.load_ds_config

    @functools.wraps(original)
    def load_ds_config(config: Any) -> dict[str, Any]:
        return read_document(config) if _is_yaml(config) else original(config)

    module.load_ds_config = load_ds_config


def _wrap_config(cls: Any) -> None:
    original = cls.__init__

    @functools.wraps(original)
    def __init__(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        original(self, read_document(config) if _is_yaml(config) else config, *args, **kwargs)
        block = self._param_dict.get(BLOCK)
        self.communication_compression = None if block is None else parse(block)
        if self.communication_compression is None:
            return
        _refuse_config(self)
        if self.communication_data_type is None and self.grad_accum_dtype == "fp32":
            # DeepSpeed would round accumulated fp32 gradients to the model's dtype for the wire. Compressed, they cost
            # the same there in either dtype, and error feedback cannot see a rounding that happens before it.
            import torch

            self.communication_data_type = torch.float32

    cls.__init__ = __init__


def _refuse_config(config: Any) -> None:
    """Raise `UnsupportedError` for what the config alone rules out."""
    zero = config.zero_config
    offload = zero.offload_optimizer
    refusals = (
        (zero.stage == 3, "ZeRO stage 3 is not supported yet", "set zero_optimization.stage to 0, 1 or 2"),
        (zero.zero_quantized_gradients, "ZeRO++ compresses gradients itself", "remove zero_quantized_gradients"),
        (zero.zenflow, "ZenFlow reduces gradients on a path of its own", "remove zero_optimization.zenflow"),
        (getattr(offload, "super_offload", False), "SuperOffload is not supported", "set super_offload to false"),
        (config.compile_config.deepcompile, "DeepCompile calls NCCL from C++", "set compile.deepcompile to false"),
        (
            config.torch_autocast_enabled and str(config.torch_autocast_dtype) == "torch.float16",
            "torch_autocast with float16 scales the loss where DeepSpeed does not say so",
            "use bfloat16, or the fp16 block with ZeRO stage 1 or 2",
        ),
    )
    _refuse(refusals)


def _refuse_engine(engine: Any) -> None:
    """Raise `UnsupportedError` for what only the built engine shows."""
    from deepspeed.runtime.base_optimizer import ZeROOptimizer

    module, optimizer = engine.module, engine.optimizer
    sparse = [name for name, m in module.named_modules() if getattr(m, "sparse", False) and hasattr(m, "embedding_dim")]
    model_parallel = engine.mp_world_size > 1 or engine.sequence_parallel_size > 1 or engine.autotp_size() > 1
    scaled = engine.fp16_enabled() and not isinstance(optimizer, ZeROOptimizer)
    refusals = (
        (engine.pipeline_parallelism, "the pipeline engine is not supported yet", "pass a plain module instead"),
        (engine.has_moe_layers, "mixture-of-experts layers are not supported yet", "train without DeepSpeed MoE"),
        (model_parallel, "tensor and sequence parallelism are not supported yet", "use data parallelism only"),
        (sparse, f"{', '.join(sparse)} makes sparse gradients", "build the embedding with sparse=False"),
        (optimizer is None, "there is no optimizer, so nothing is reduced", "give deepspeed.initialize an optimizer"),
        (
            scaled and (engine.dynamic_loss_scale() or engine.loss_scale() != 1),
            "DeepSpeed divides fp16 gradients by the loss scale at ZeRO stage 0 but does not multiply the loss by it",
            "use bf16, or ZeRO stage 1 or 2",
        ),
    )
    _refuse(refusals)


def _refuse(refusals: Any) -> None:
    for present, reason, remedy in refusals:
        if present:
            raise UnsupportedError(f"{BLOCK}: {reason}; {remedy}, or remove the block")


# ---------------------------------------------------------------- the engine


def _wrap_engine(cls: Any) -> None:
    original = cls.__init__

    @functools.wraps(original)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        config = getattr(self._config, "communication_compression", None)
        if config is not None:
            self.communication_compression = attach(self, config)

    cls.__init__ = __init__


def attach(engine: Any, config: Config) -> Session:
    """Compress the gradient reductions of `engine`, on every rank.

    Raises:
        UnsupportedError: this engine cannot be compressed; the message says why and what to change.
        MismatchError: a rank has another configuration or model, or did not load the plugin.
    """
    import deepspeed
    import torch
    from deepspeed.comm import comm
    from torch.distributed.distributed_c10d import _get_default_store

    from ...engine.notice import announce
    from ...engine.plan import TensorSpec, make_plan
    from ...engine.preload import warm_up
    from ...engine.reducer import Reducer
    from ...engine.telemetry import Telemetry
    from ...transports.torch_distributed import TorchDistributed
    from ..shared.store_handshake import handshake
    from . import checkpoint as deepspeed_checkpoint
    from . import seams as deepspeed_seams
    from .session import CompressedBackend, Session

    global _attached
    _refuse_engine(engine)
    zero = engine.zero_optimization() and hasattr(engine.optimizer, "ipg_buckets")
    deepspeed_seams.check(engine, deepspeed_seams.ENGINE_SEAMS, deepspeed.__version__)
    if zero:
        deepspeed_seams.check(engine.optimizer, deepspeed_seams.ZERO_SEAMS, deepspeed.__version__)

    trainable = [(n, p) for n, p in engine.module.named_parameters() if p.requires_grad and p.numel()]
    plan = make_plan(config, [TensorSpec(n, tuple(p.shape), str(p.dtype), str(p.device)) for n, p in trainable])
    facts = {
        "config": config.to_dict(),
        "plan": plan.digest(),
        "tensors": len(trainable),
        "versions": {
            "compression_plugins": __version__,
            "deepspeed": deepspeed.__version__,
            "torch": torch.__version__,
        },
        "zero_stage": int(engine.zero_optimization_stage()),
    }
    _attached += 1
    rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    handshake(_get_default_store(), f"compression_plugins/deepspeed/{_attached}", rank, size, facts)

    group = engine.seq_data_parallel_group
    reducer = Reducer(config, TorchDistributed(group), Telemetry.from_environment(rank), undo=_may_skip(engine))
    warm_up(config, plan, reducer.transport.rank, reducer.transport.size, sharded=zero)
    session = Session(engine, plan, reducer, group)
    comm.cdb = CompressedBackend.adopt(comm.cdb)
    deepspeed_seams.mark_zero(session) if zero else deepspeed_seams.mark_engine(session)
    _follow_steps(session)
    deepspeed_checkpoint.follow(session)
    if rank == 0:
        announce(
            f"DeepSpeed {deepspeed.__version__}, ZeRO stage {facts['zero_stage']}, {session.size} ranks: {plan.table()}"
        )
    return session


def _may_skip(engine: Any) -> bool:
    """Whether this engine can discard a step because of a non-finite gradient."""
    optimizer = engine.optimizer
    if hasattr(optimizer, "check_grad_overflow"):  # ZeRO 1 and 2: any dtype but bf16 also checks the norm
        import torch

        return bool(optimizer.check_grad_overflow) or optimizer.dtype != torch.bfloat16
    return hasattr(optimizer, "overflow")


def _follow_steps(session: Session) -> None:
    """Tell the reducer when an optimizer step is over, and whether DeepSpeed skipped it."""
    engine = session.engine
    original = engine._take_model_step

    @functools.wraps(original)
    def _take_model_step(*args: Any, **kwargs: Any) -> Any:
        weights, step = session.weights, session.reducer.step
        if weights is not None:
            weights.before_step()
        with session.gathering():
            result = original(*args, **kwargs)
        if weights is not None:
            weights.after_step(step)
        session.reducer.end_step(skipped=bool(getattr(engine.optimizer, "overflow", False)))
        return result

    engine._take_model_step = _take_model_step


if importlib.util.find_spec("deepspeed") is not None and "deepspeed.runtime.engine" not in sys.modules:
    import deepspeed.runtime.engine  # noqa: F401
if importlib.util.find_spec("deepspeed") is not None:
    install()
