"""The block `communication_compression` of a DeepSpeed config, and what it rules out.

"communication_compression": {"scheme": "scalecom", "ratio": 100}        # the keys of our YAML, inline
"communication_compression": {"file": "configs/scalecom.yaml"}           # or a file, or the name of a scheme
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ...config import Config
from ...errors import ConfigError, UnsupportedError, shown

BLOCK = "communication_compression"


def parse(block: Any) -> Config | None:
    """The configuration in a block; None when it says `"enabled": false`.

    Raises:
        ConfigError: anything in it is unknown.
    """
    if block is None:
        raise ConfigError(
            f'{BLOCK} is null: give it a scheme, as in {{"scheme": "scalecom"}}, switch it off with '
            '{"enabled": false}, or remove it'
        )
    if not isinstance(block, Mapping):
        raise ConfigError(
            f'{BLOCK} must be a mapping such as {{"scheme": "scalecom"}} or {{"file": "scalecom.yaml"}}, '
            f"not {shown(block)}"
        )
    document = dict(block)
    enabled = document.pop("enabled", True)
    if not isinstance(enabled, bool):
        raise ConfigError(f"{BLOCK}: enabled must be true or false, not {shown(enabled)}")
    file = document.pop("file", None)
    if file is not None and not isinstance(file, str):
        raise ConfigError(f"{BLOCK}: file must be a path or the name of a scheme, not {shown(file)}")
    if file is not None and Path(file).is_dir():
        raise ConfigError(f"{BLOCK}: file {shown(file)} is a folder; name a YAML file, or a scheme")
    config = Config.load(document) if file is None else Config.load(file, document)
    return config if enabled else None


def wire_dtype(engine: Any) -> Any:
    """The dtype in which DeepSpeed by itself would send gradients; what is not compressed travels in it."""
    import torch

    config = engine._config
    if config.communication_data_type is not None and not config.communication_compression_widened:
        return config.communication_data_type
    if engine.fp16_enabled():
        return torch.float16
    return torch.bfloat16 if engine.bfloat16_enabled() else torch.float32


def refuse_engine(engine: Any) -> None:
    """Raise `UnsupportedError` for what only the built engine shows."""
    from deepspeed.runtime.base_optimizer import ZeROOptimizer

    asked = BLOCK if BLOCK in engine._config._param_dict else f"optimizer.type {engine.optimizer_name()}"
    module, optimizer = engine.module, engine.optimizer
    sparse = [name for name, m in module.named_modules() if getattr(m, "sparse", False) and hasattr(m, "embedding_dim")]
    tensor_parallel = engine.mp_world_size > 1 or engine.autotp_size() > 1
    scaled = engine.fp16_enabled() and not isinstance(optimizer, ZeROOptimizer)
    refuse((
        (engine.pipeline_parallelism, "the pipeline engine is not supported yet", "pass a plain module instead"),
        (
            engine.has_moe_layers,
            "mixture-of-experts layers, whose expert parallel groups reduce by themselves, are not supported yet",
            "train without DeepSpeed MoE",
        ),
        (tensor_parallel, "tensor parallel groups are not supported yet", "use data parallelism only"),
        (
            engine.sequence_parallel_size > 1,
            "sequence parallel groups are not supported yet",
            "use data parallelism only",
        ),
        (sparse, f"{', '.join(sparse)} makes sparse gradients", "build the embedding with sparse=False"),
        (optimizer is None, "there is no optimizer, so nothing is reduced", "give deepspeed.initialize an optimizer"),
        (
            scaled and (engine.dynamic_loss_scale() or engine.loss_scale() != 1),
            "DeepSpeed divides fp16 gradients by the loss scale at ZeRO stage 0 but does not multiply the loss by it",
            "use bf16, or ZeRO stage 1 or 2",
        ),
    ), asked)  # fmt: skip


def refuse_local_steps(engine: Any, config: Config) -> None:
    """Raise `UnsupportedError` where ranks cannot train by themselves for some steps."""
    from deepspeed.runtime.base_optimizer import DeepSpeedOptimizer

    several, stage = config.every > 1, engine.zero_optimization_stage()
    refuse((
        (
            several and stage > 0,
            f"every: {config.every} lets each rank take steps by itself, and ZeRO stage {stage} shards the optimizer",
            "set zero_optimization.stage to 0, or every to 1",
        ),
        (
            several and isinstance(engine.optimizer, DeepSpeedOptimizer),
            f"every: {config.every} averages the parameters, and the bf16 and fp16 blocks train fp32 copies of them",
            "use torch_autocast instead of the block, or set every to 1",
        ),
    ))  # fmt: skip


def refuse_levels(engine: Any, config: Config) -> None:
    """Raise `UnsupportedError` where ranks cannot meet on two levels."""
    stage = engine.zero_optimization_stage()
    refuse((
        (
            config.levels is not None and stage > 0,
            f"levels: {config.levels}: the ranks of a node share out the whole average, of which ZeRO stage {stage} "
            "leaves a shard",
            "set zero_optimization.stage to 0, or remove levels",
        ),
    ))  # fmt: skip


def refuse_skips(engine: Any, config: Config) -> None:
    """Raise `UnsupportedError` where a step cannot be skipped."""
    from deepspeed.runtime.base_optimizer import DeepSpeedOptimizer

    flat = isinstance(engine.optimizer, DeepSpeedOptimizer) and not engine.zero_optimization()
    refuse((
        (
            config.on_nonfinite == "skip" and flat and not engine.fp16_enabled(),
            "on_nonfinite: skip: DeepSpeed's bf16 optimizer at ZeRO stage 0 has no way to skip a step",
            "set zero_optimization.stage to 1 or 2, or on_nonfinite to raise",
        ),
    ))  # fmt: skip


def refuse_direction(engine: Any, config: Config, size: int) -> None:
    """Raise `UnsupportedError` for a direction that cannot be formed in this engine."""
    kind, stage = config.direction.kind, int(engine.zero_optimization_stage())
    refuse((
        (
            config.direction.shared and stage > 0,
            f"direction: {kind} needs the whole average on every rank, of which ZeRO stage {stage} leaves a shard",
            "set zero_optimization.stage to 0, or direction to gradient",
        ),
        (
            config.direction.formed and size == 1,
            f"on one rank nothing is reduced, so no direction: {kind} is formed",
            "run on two ranks, or set direction to gradient and let the script's optimizer have the moments",
        ),
        (
            config.direction.formed and engine.gradient_clipping(),
            f"gradient_clipping {engine.gradient_clipping()} would clip what direction: {kind} makes, not gradients",
            "set gradient_clipping to 0, or direction to gradient",
        ),
    ))  # fmt: skip


def refuse(refusals: Sequence[tuple[Any, str, str]], asked: str = BLOCK) -> None:
    """Raise `UnsupportedError` for the first (present, reason, remedy) that is present.

    Args:
        asked: the part of the config that asks for compression.
    """
    for present, reason, remedy in refusals:
        if present:
            raise UnsupportedError(f"{asked}: {reason}; {remedy}{', or remove the block' if asked == BLOCK else ''}")


def refuse_config(config: Any) -> None:
    """Raise `UnsupportedError` for what the config alone rules out."""
    zero = config.zero_config
    offload = zero.offload_optimizer
    refuse((
        (
            zero.stage == 3 and zero.zero_hpz_partition_size > 1,
            "hpZ (zero_hpz_partition_size) fetches parameters from a second copy inside a node",
            "set zero_optimization.zero_hpz_partition_size to 1",
        ),
        (
            zero.zero_quantized_weights or zero.zero_quantized_nontrainable_weights,
            "ZeRO++ quantizes weights itself",
            "remove zero_quantized_weights; parameters: {scheme: qsgd, bits: 8} in the block does the like",
        ),
        (
            zero.zero_quantized_gradients,
            "ZeRO++ compresses gradients itself",
            "remove zero_quantized_gradients (the block's own 4 bits, with a memory, are scheme ecq_sgd)",
        ),
        (zero.zenflow, "ZenFlow reduces gradients on a path of its own", "remove zero_optimization.zenflow"),
        (getattr(offload, "super_offload", False), "SuperOffload is not supported", "set super_offload to false"),
        (config.compile_config.deepcompile, "DeepCompile calls NCCL from C++", "set compile.deepcompile to false"),
        (
            config.torch_autocast_enabled and str(config.torch_autocast_dtype) == "torch.float16",
            "torch_autocast with float16 scales the loss where DeepSpeed does not say so",
            "use bfloat16, or the fp16 block with ZeRO stage 1 or 2",
        ),
    ))  # fmt: skip
