"""From the command line to the first step: unmodified scripts, YAML, and every refusal."""

from __future__ import annotations

import json
import re
import time

import pytest

from .job import SCRIPTS, deepspeed

YAML = """\
train_micro_batch_size_per_gpu: 32
optimizer: {type: AdamW, params: {lr: 3e-3, torch_adam: true}}   # 3e-3: a number here, as in JSON
zero_optimization: {stage: 2}
steps_per_print: 1000
communication_compression: {file: scalecom.yaml, ratio: 20}
"""
SCALECOM = "scheme: scalecom\nratio: 100\nbeta: 1.0\n"

#: What must stand in the message, and part of the remedy.
REFUSALS = {
    "hpz": ("UnsupportedError", "hpZ (zero_hpz_partition_size)", "zero_hpz_partition_size to 1"),
    "mics": ("DeepSpeedConfigError", "MiCS ZeRO-3 sharding has been removed", "mics_shard_size"),  # by DeepSpeed
    "qwz": ("UnsupportedError", "ZeRO++ quantizes weights itself", "parameters: {scheme: qsgd, bits: 8}"),
    "patch at stage 3": ("UnsupportedError", "under ZeRO stage 3 none holds", "{scheme: qsgd, bits: 8}"),
    "mu rule at stage 3": ("UnsupportedError", "mu rule", "weights: false"),
    "weights at stage 0": ("UnsupportedError", "parameters: qsgd is about weights that travel", "remove the key"),
    "weights twice": ("ConfigError", "two ways for one thing", "weights: false"),
    "signs of weights": ("ConfigError", "'ef_signsgd' cannot say what has changed", "valid: bf16"),
    "typo in parameters": ("ConfigError", "unknown key 'bit'", "did you mean 'bits'"),
    "zero++": ("UnsupportedError", "ZeRO++", "zero_quantized_gradients"),
    "zenflow": ("UnsupportedError", "ZenFlow", "remove zero_optimization.zenflow"),
    "deepcompile": ("UnsupportedError", "DeepCompile", "compile.deepcompile to false"),
    "superoffload": ("UnsupportedError", "SuperOffload", "super_offload to false"),
    "fp16 stage 0": ("UnsupportedError", "loss scale", "bf16, or ZeRO stage 1 or 2"),
    "autocast fp16": ("UnsupportedError", "torch_autocast", "bfloat16"),
    "pipeline": ("UnsupportedError", "pipeline", "plain module"),
    "moe": ("UnsupportedError", "expert parallel groups", "without DeepSpeed MoE"),
    "tensor parallel": ("UnsupportedError", "tensor parallel groups", "data parallelism only"),
    "sequence parallel": ("UnsupportedError", "sequence parallel groups", "data parallelism only"),
    "sparse": ("UnsupportedError", "sparse gradients", "sparse=False"),
    "typo": ("ConfigError", "'ration'", "'ratio'"),
    "not a mapping": ("ConfigError", "must be a mapping", "scheme"),
    "enabled": ("ConfigError", "enabled", "true or false"),
    "shared moments": ("UnsupportedError", "frozen_adam needs the whole average", "zero_optimization.stage to 0"),
    "clipped": ("UnsupportedError", "would clip what direction: momentum makes", "gradient_clipping to 0"),
    "second moments": ("UnsupportedError", "this SGD has momentum 0.9", "torch.optim.SGD(lr=...)"),
    "misspelt": ("ConfigError", "'comunication_compression'", "did you mean 'communication_compression'?"),
    "hyphens": ("ConfigError", "'communication-compression'", "did you mean 'communication_compression'?"),
    "null": ("ConfigError", "is null", '{"enabled": false}, or remove it'),
    "a folder": ("ConfigError", "is a folder", "name a YAML file, or a scheme"),
    "no exemption matches": ("ConfigError", "exempt pattern 'x*' matches none", "Correct it or remove it"),
    "loco and a block": ("ConfigError", "both say how gradients travel", "remove zeropp_loco_param"),
    "loco misspelt": ("ConfigError", "unknown key 'err_bet'", "did you mean 'err_beta'?"),
    "one bit with ZeRO": ("UnsupportedError", "not compatible with ZeRO stage 1", "zero_optimization.stage to 0, or"),
    "one bit in fp16": ("UnsupportedError", "does not multiply the loss by it", '"bf16": {"enabled": true}'),
    "one bit misspelt": ("ConfigError", "unknown key 'freezestep'", "did you mean 'freeze_step'?"),
    "one bit and warm-up": ("UnsupportedError", "warmup_steps is set", "remove warmup_steps"),
    "one bit switched off": ("UnsupportedError", "enabled: false", "optimizer.type to Adam or Lamb"),
    "one bit from the script": ("UnsupportedError", "an optimizer of its own", "remove optimizer from the config"),
    "one bit pipeline": ("UnsupportedError", "optimizer.type onebitadam: the pipeline engine", "plain module"),
    "no rule matches": ("ConfigError", "'x*'", "matches none"),
    "another ratio": ("MismatchError", "rank 1 differs from rank 0", "config.ratio (10.0 on rank 0, 11.0 there)"),
    "another model": ("MismatchError", "rank 1 differs from rank 0", "tensors.weight"),
    "other buffers": ("MismatchError", "rank 1 differs from rank 0", "zero_optimization.reduce_bucket_size"),
    "other freeze": ("MismatchError", "rank 1 differs from rank 0", "optimizer.freeze_step (10 on rank 0, 11 there)"),
    "other reduction": ("MismatchError", "rank 1 differs", "contiguous_gradients (False on rank 0, True there)"),
    "other wire": ("MismatchError", "rank 1 differs", "communication_data_type ('torch.bfloat16' on rank 0"),
    "other clipping": ("MismatchError", "rank 1 differs from rank 0", "gradient_clipping (0.0 on rank 0, 0.5 there)"),
}


@pytest.fixture(scope="module")
def errors(tmp_path_factory):
    folder = tmp_path_factory.mktemp("refusals")
    job = deepspeed("refusals.py", folder, launcher=False)
    assert job.returncode == 0, job.stdout[-20000:]
    return [json.loads((folder / f"errors{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("case", REFUSALS)
def test_what_cannot_be_compressed_is_refused_on_every_rank_with_the_remedy(errors, case):
    kind, reason, remedy = REFUSALS[case]
    for found in errors:
        assert found[case].startswith(kind), found[case]
        assert reason in found[case] and remedy in found[case], found[case]


def test_an_unmodified_script_with_a_yaml_config_trains_compressed(tmp_path):
    (tmp_path / "ds.yaml").write_text(YAML)
    (tmp_path / "scalecom.yaml").write_text(SCALECOM)
    counters = tmp_path / "counters.jsonl"
    environment = {"COMPRESSION_PLUGINS_TELEMETRY": str(counters)}
    job = deepspeed("train.py", "--deepspeed_config", "ds.yaml", folder=tmp_path, environment=environment)
    assert job.returncode == 0, job.stdout[-20000:]
    results = re.findall(r"RESULT rank=(\d) loss=([\d.]+) lr=([\d.]+)", job.stdout)
    assert sorted(rank for rank, _, _ in results) == ["0", "1"]
    assert all(float(lr) == 3e-3 for _, _, lr in results)
    steps = [json.loads(line) for line in counters.read_text().splitlines()]
    assert len(steps) == 30
    assert steps[-1]["ratio"] > 10 and steps[20]["residual_norm"] > 0
    assert "scalecom(ratio=20" in job.stdout  # the table of the plan
    assert "import compression" not in (SCRIPTS / "train.py").read_text()


def test_a_rank_without_the_plugin_is_named_within_the_time_out(tmp_path):
    started = time.monotonic()
    environment = {"COMPRESSION_PLUGINS_HANDSHAKE_TIMEOUT": "5"}
    arguments = ("--deepspeed_config", str(tmp_path / "ds.json"))
    (tmp_path / "ds.json").write_text(json.dumps({
        "train_micro_batch_size_per_gpu": 32,
        "optimizer": {"type": "SGD", "params": {"lr": 0.1}},
        "communication_compression": {"scheme": "scalecom"},
    }))  # fmt: skip
    job = deepspeed("absent.py", *arguments, environment=environment, launcher=False)
    assert job.returncode != 0
    assert "rank 1 did not answer within 5 s" in job.stdout
    assert "compression-plugins is not installed there" in job.stdout
    assert time.monotonic() - started < 100
