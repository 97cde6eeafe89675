"""What a user of `deepspeed` with the block sees: the same training, fewer bytes. Two real ranks."""

from __future__ import annotations

import pytest
import torch

from .job import run_cases

BASE = {
    "train_micro_batch_size_per_gpu": 16,
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
    "steps_per_print": 1000,
}
BF16 = {"bf16": {"enabled": True}}
FP16 = {"fp16": {"enabled": True, "initial_scale_power": 10, "hysteresis": 1, "loss_scale_window": 100}}
ACCUMULATE = {"data_types": {"grad_accum_dtype": "fp32"}, "communication_data_type": "fp32"}


def zero(stage: int, **options) -> dict:
    return {"zero_optimization": {"stage": stage, **options}}


#: Every path on which DeepSpeed 0.19 reduces gradients at stages 0 to 2, and what may change a value on it.
PATHS = {
    "stage 0": {},
    "stage 0, bf16": BF16,
    "stage 0, prescaled": {"prescale_gradients": True, "gradient_clipping": 0.5},
    "stage 0, predivided": {"gradient_predivide_factor": 2.0},
    "stage 1": zero(1),
    "stage 1, fp16": {**zero(1), **FP16},
    "stage 1, bf16 with fp32 gradients": {**zero(1), **BF16, **ACCUMULATE},
    "stage 2": zero(2),
    "stage 2, bf16": {**zero(2), **BF16},
    "stage 2, bf16 with fp32 gradients": {**zero(2), **BF16, **ACCUMULATE, "gradient_accumulation_steps": 2},
    "stage 2, fp16": {**zero(2), **FP16},
    "stage 2, accumulation and clipping": {**zero(2), "gradient_accumulation_steps": 3, "gradient_clipping": 0.1},
    "stage 2, overlap, small buckets": zero(2, overlap_comm=True, reduce_bucket_size=5000),
    "stage 2, no reduce-scatter": zero(2, reduce_scatter=False, reduce_bucket_size=8000),
    "stage 2, no contiguous gradients": zero(2, contiguous_gradients=False),
    "stage 2, reduce to each owner": zero(2, use_multi_rank_bucket_allreduce=False),
}
#: Keeps every value, but through selection, packing, transport and unpacking; the rest travels dense beside it.
IDENTITY = {"scheme": "topk", "ratio": 1, "min_numel": 0, "exempt": ["second*"]}
SCHEMES = {
    "ef_signsgd": {"scheme": "ef_signsgd", "min_numel": 0},
    "scalecom": {"scheme": "scalecom", "ratio": 20, "min_numel": 0},
    "qsgd": {"scheme": "qsgd", "bits": 4, "min_numel": 0},
}
DOUBLE = {"scheme": "double_quantization", "bits": 8, "min_numel": 0}


def case(config: dict, block: dict | None = None, steps: int = 4, **more) -> dict:
    return {
        "config": {**BASE, **config, **({"communication_compression": block} if block else {})},
        "steps": steps,
        **more,
    }


@pytest.fixture(scope="module")
def identity(tmp_path_factory):
    cases = {}
    for name, config in PATHS.items():
        cases[f"{name}: dense"] = case(config)
        cases[f"{name}: identity"] = case(config, IDENTITY)
    return run_cases(tmp_path_factory.mktemp("identity"), cases, timeout=280)


@pytest.fixture(scope="module")
def training(tmp_path_factory):
    cases = {"none": case(zero(2), {"scheme": "none"}), "dense": case(zero(2)), "bf16 dense": case({**zero(2), **BF16})}
    for stage in (0, 1, 2):
        for scheme, block in SCHEMES.items():
            cases[f"{scheme} {stage}"] = case(zero(stage), block, steps=8)
    block = {"scheme": "topk", "ratio": 10, "min_numel": 0}
    for stage in (1, 2):
        cases[f"overflow {stage}"] = case({**zero(stage), **FP16}, block, steps=8, overflow=3)
        cases[f"left out {stage}"] = case({**zero(stage), **FP16}, block, steps=8, leave_out=3)
    for stage in (0, 1, 2):
        cases[f"exact gradients {stage}"] = case(zero(stage), {**DOUBLE, "weights": False}, steps=6)
        cases[f"exact weights {stage}"] = case(zero(stage), {**DOUBLE, "mu": 1e-14}, steps=6)
        cases[f"double {stage}"] = case(zero(stage), {**DOUBLE, "mu": 200.0, "snapshot_steps": 4}, steps=8)
    cases["double bf16 1"] = case({**zero(1), **BF16, **ACCUMULATE}, {**DOUBLE, "mu": 2.0}, steps=8)
    cases["warm-up"] = case(zero(2), {**block, "warmup_steps": 4})
    cases["disabled"] = case(zero(2), {**block, "enabled": False})
    return run_cases(tmp_path_factory.mktemp("training"), cases, timeout=280)


@pytest.mark.parametrize("path", PATHS)
def test_an_identity_codec_trains_bit_for_bit_as_deepspeed_without_the_plugin(identity, path):
    dense, compressed = identity[f"{path}: dense"], identity[f"{path}: identity"]
    assert compressed[0]["compressed"] and not dense[0]["compressed"]
    assert compressed[0]["sent"] > 0
    torch.testing.assert_close(compressed[0]["weights"], dense[0]["weights"], rtol=0, atol=1e-6)


def test_replicas_are_equal_bit_for_bit(identity, training):
    for name, (first, second) in {**identity, **training}.items():
        assert torch.equal(first["weights"], second["weights"]), name


def test_a_collective_of_the_user_is_exact(training):
    for name, reports in training.items():
        for report in reports:
            assert torch.equal(report["metric"], torch.arange(4096.0) * 3), name


@pytest.mark.parametrize("stage", [0, 1, 2])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_fewer_bytes_are_sent_and_the_loss_falls(training, scheme, stage):
    report = training[f"{scheme} {stage}"][0]
    ring = report["dense"]  # 2 (n - 1) / n bytes a byte of the buffer, n = 2
    least = {"ef_signsgd": 12, "scalecom": 8, "qsgd": 4}[scheme]
    assert ring / report["sent"] > least
    assert report["losses"][-1] < report["losses"][0]


def test_zero_sends_one_all_to_all_which_halves_what_stage_0_sends(training):
    ratio = training["qsgd 0"][0]["sent"] / training["qsgd 2"][0]["sent"]
    assert 1.6 < ratio < 2.1  # biases and norms travel by all-reduce at every stage


@pytest.mark.parametrize("stage", [1, 2])
def test_an_fp16_overflow_is_skipped_on_every_rank_and_leaves_no_trace(training, stage):
    hit, clean = training[f"overflow {stage}"], training[f"left out {stage}"]
    for report in hit:
        assert report["skipped"] == [0, 0, 0, 1, 1, 1, 1, 1]
        assert report["scales"][3:] == [512.0] * 5 and report["scales"][2] == 1024.0
        assert report["step"] == 7
    for with_overflow, without in zip(hit, clean, strict=True):
        torch.testing.assert_close(with_overflow["weights"], without["weights"], rtol=0, atol=1e-6)
        for name, pieces in without["residuals"].items():
            for start, residual in pieces.items():  # in units of the unscaled loss, although the scale was halved
                torch.testing.assert_close(with_overflow["residuals"][name][start], residual, rtol=1e-2, atol=1e-6)


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_double_quantization_computes_with_quantized_weights_and_steps_exact_ones(training, stage):
    plain, exact = training[f"exact gradients {stage}"][0], training[f"exact weights {stage}"][0]
    assert torch.equal(plain["weights"], exact["weights"])  # an error of nothing allowed: the weights themselves
    double = training[f"double {stage}"][0]
    assert double["losses"][-1] < double["losses"][0]
    embedding, master = double["weights"][: 64 * 48], double["master"][: 64 * 48]
    if stage == 0:  # every rank holds all exact weights, and shows them outside forward and backward
        assert torch.equal(embedding, master)
        return
    # Steps 0 and 4 are snapshots, so the last step left quantized weights: the embedding takes 8-bit values.
    assert embedding.unique().numel() <= 255 < master.unique().numel()
    assert (embedding - master).abs().max() <= master.abs().max() / 127


def test_the_weights_of_zero_travel_as_codes(training):
    gradients, both = training["exact gradients 2"][0]["sent"] / 6, training["double 2"][0]["sent"] / 8
    partition = 4 * training["double 2"][0]["weights"].numel() / 2  # bytes of fp32 that a rank would send
    assert 0.1 * partition < both - gradients < 0.6 * partition


def test_warm_up_none_and_disabled_are_deepspeeds_own_all_reduce(training):
    for name in ("warm-up", "none", "disabled"):
        assert torch.equal(training[name][0]["weights"], training["dense"][0]["weights"]), name
    assert not training["disabled"][0]["compressed"]
    assert training["warm-up"][0]["sent"] == training["warm-up"][0]["dense"]
