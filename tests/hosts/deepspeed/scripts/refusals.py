"""Try to start what must be refused; write the error that each rank got for each case."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import deepspeed
import deepspeed.comm as dist
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.moe.layer import MoE
from deepspeed.pipe import PipelineModule

FOLDER = Path(sys.argv[1])
TOPK = {"scheme": "topk", "ratio": 10}
FP16 = {"fp16": {"enabled": True}}
NO_BLOCK = {"no block": True}


def zero(**options) -> dict:
    return {"zero_optimization": options}


def one_bit(kind: str, **parameters) -> dict:
    return {"optimizer": {"type": kind, "params": {"lr": 0.1, **parameters}}}


def block(**keys) -> dict:
    """TOPK with other keys; `...` removes one."""
    document = {key: value for key, value in {**TOPK, **keys}.items() if value is not ...}
    return {"communication_compression": document}


def cases() -> dict[str, tuple[dict, torch.nn.Module | None]]:
    """Name -> (config beyond the ordinary one, model or None for the ordinary one)."""
    rank = dist.get_rank()
    linear = torch.nn.Linear(32, 32)
    return {
        "hpz": (zero(stage=3, zero_hpz_partition_size=2), None),
        "mics": (zero(stage=3, mics_shard_size=2), None),
        "qwz": (zero(stage=3, zero_quantized_weights=True), None),
        "patch at stage 3": ({**zero(stage=3), **block(parameters={"scheme": "patch"})}, None),
        "mu rule at stage 3": ({**zero(stage=3), **block(scheme="double_quantization", ratio=...)}, None),
        "weights at stage 0": (block(parameters={"scheme": "qsgd"}), None),
        "weights twice": (
            {**zero(stage=1), **block(scheme="double_quantization", ratio=..., parameters={"scheme": "patch"})},
            None,
        ),
        "signs of weights": ({**zero(stage=1), **block(parameters={"scheme": "ef_signsgd"})}, None),
        "typo in parameters": ({**zero(stage=1), **block(parameters={"scheme": "qsgd", "bit": 4})}, None),
        "zero++": (zero(stage=2, zero_quantized_gradients=True), None),
        "zenflow": (zero(stage=2, zenflow={"topk_ratio": 0.1}, offload_optimizer={"device": "cpu"}), None),
        "deepcompile": ({**zero(stage=1), "compile": {"deepcompile": True}}, None),
        "superoffload": (zero(stage=2, offload_optimizer={"device": "cpu", "super_offload": True}), None),
        "fp16 stage 0": (FP16, None),
        "autocast fp16": ({"torch_autocast": {"enabled": True, "dtype": "float16"}, **zero(stage=1)}, None),
        "pipeline": ({}, PipelineModule(layers=[linear], num_stages=1, loss_fn=torch.nn.MSELoss())),
        "moe": ({}, MoE(32, linear, num_experts=2)),
        "sparse": ({}, torch.nn.Sequential(torch.nn.Embedding(64, 32, sparse=True), torch.nn.Linear(32, 32))),
        "typo": ({"communication_compression": {**TOPK, "ration": 3}}, None),
        "not a mapping": ({"communication_compression": "topk"}, None),
        "enabled": ({"communication_compression": {**TOPK, "enabled": "yes"}}, None),
        "shared moments": (
            {**zero(stage=1), "communication_compression": {**TOPK, "direction": "frozen_adam", "warmup_steps": 5}},
            None,
        ),
        "clipped": ({"communication_compression": {**TOPK, "direction": "momentum"}}, None),
        "second moments": (
            {
                "optimizer": {"type": "SGD", "params": {"lr": 0.1, "momentum": 0.9}},
                "gradient_clipping": 0.0,
                "communication_compression": {**TOPK, "direction": "momentum"},
            },
            None,
        ),
        "misspelt": ({"comunication_compression": TOPK}, None),
        "hyphens": ({"communication-compression": TOPK}, None),
        "null": ({"communication_compression": None}, None),
        "a folder": ({"communication_compression": {"file": str(FOLDER)}}, None),
        "no exemption matches": ({"communication_compression": {**TOPK, "exempt": ["x*"]}}, None),
        "loco and a block": (zero(stage=2, zeropp_loco_param={"err_beta": 0.8}), None),
        "loco misspelt": ({**zero(stage=2, zeropp_loco_param={"err_bet": 0.8}), **NO_BLOCK}, None),
        "one bit with ZeRO": ({**one_bit("OneBitAdam"), **zero(stage=1), **NO_BLOCK}, None),
        "one bit in fp16": ({**one_bit("OneBitLamb"), **FP16, **NO_BLOCK}, None),
        "one bit misspelt": ({**one_bit("onebitadam", freezestep=3), **NO_BLOCK}, None),
        "one bit and warm-up": (
            {**one_bit("OneBitAdam"), "communication_compression": {**TOPK, "warmup_steps": 9}},
            None,
        ),
        "one bit switched off": (
            {**one_bit("ZeroOneAdam"), "communication_compression": {**TOPK, "enabled": False}},
            None,
        ),
        "one bit from the script": ({**one_bit("ZeroOneAdam"), "client": True}, None),
        "one bit pipeline": (
            {**one_bit("OneBitAdam"), **NO_BLOCK},
            PipelineModule(layers=[torch.nn.Linear(32, 32)], num_stages=1, loss_fn=torch.nn.MSELoss()),
        ),
        "no rule matches": (
            {"communication_compression": {**TOPK, "rules": [{"match": "x*", "scheme": "none"}]}},
            None,
        ),
        "another ratio": ({"communication_compression": {**TOPK, "ratio": 10 + rank}}, None),
        "another model": ({}, torch.nn.Linear(32, 32 + rank)),
        "other buffers": (zero(stage=2, reduce_bucket_size=10_000 + rank), None),
        "other freeze": (one_bit("OneBitAdam", freeze_step=10 + rank), None),
        "other reduction": (zero(stage=2, contiguous_gradients=bool(rank)), None),
        "other wire": ({"communication_data_type": ("bf16", "fp16")[rank]}, None),
        "other clipping": ({"gradient_clipping": 0.5 * rank}, None),
        # The last ones: DeepSpeed keeps their groups for the rest of the process.
        "sequence parallel": ({}, None),
        "tensor parallel": ({}, None),
    }


class Mpu:
    """Groups as Megatron hands them to DeepSpeed: both ranks are one model."""

    def __init__(self) -> None:
        self.whole = dist.new_group([0, 1])
        self.alone = [dist.new_group([rank]) for rank in range(2)][dist.get_rank()]

    def get_model_parallel_rank(self) -> int:
        return dist.get_rank()

    def get_model_parallel_world_size(self) -> int:
        return 2

    def get_model_parallel_group(self) -> Any:
        return self.whole

    def get_data_parallel_rank(self) -> int:
        return 0

    def get_data_parallel_world_size(self) -> int:
        return 1

    def get_data_parallel_group(self) -> Any:
        return self.alone


def error_of(config: dict, model: torch.nn.Module | None, **more: Any) -> str:
    model = model or torch.nn.Linear(64, 64)
    config = {
        "train_micro_batch_size_per_gpu": 4,
        "optimizer": {"type": "SGD", "params": {"lr": 0.1}},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "communication_compression": TOPK,
        **config,
    }
    if config.pop("no block", False):
        del config["communication_compression"]
    client = torch.optim.SGD(model.parameters(), lr=0.1) if config.pop("client", False) else None
    try:
        engine, *_ = deepspeed.initialize(
            model=model, optimizer=client, model_parameters=model.parameters(), config=config, **more
        )
        engine.backward(engine(torch.ones(4, 64)).mean())
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def main() -> None:
    torch.set_num_threads(1)
    get_accelerator().is_fp16_supported = lambda: True
    deepspeed.init_distributed()
    more = {"sequence parallel": {"mesh_param": (1, 2)}, "tensor parallel": {"mpu": Mpu()}}
    found = {name: error_of(config, model, **more.get(name, {})) for name, (config, model) in cases().items()}
    (FOLDER / f"errors{dist.get_rank()}.json").write_text(json.dumps(found))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
