"""ZeRO 3: gradients scattered by any scheme, parameters fetched as codes. Two real ranks against plain DeepSpeed."""

from __future__ import annotations

import pytest
import torch

from .job import run_cases
from .test_training import BF16, FP16, IDENTITY, case, zero

LOW = {"stage3_param_persistence_threshold": 100}
OFFLOAD = {"offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}}
#: Ways of DeepSpeed at stage 3, and what may change a value on them.
WAYS = {
    "persistent": zero(3),
    "overlap, small buckets": zero(3, overlap_comm=True, reduce_bucket_size=5000, **LOW),
    "bf16, no overlap": {**zero(3, overlap_comm=False, **LOW), **BF16},
    "accumulation and clipping": {
        **zero(3, **LOW),
        "gradient_accumulation_steps": 3,
        "gradient_clipping": 0.1,
    },
    "no reduce-scatter": zero(3, reduce_scatter=False, **LOW),
    "offloaded": {**zero(3, **OFFLOAD, **LOW), "zero_force_ds_cpu_optimizer": False},
}
NONE = {"scheme": "none"}
CODED = {"scheme": "qsgd", "bits": 8, "min_numel": 100, "parameters": {"scheme": "qsgd", "bits": 8, "block": 64}}
EF = {"scheme": "ef_signsgd", "min_numel": 0}
STEPS = 4


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("zero3")
    cases = {}
    for way, config in WAYS.items():
        for name, block in (("dense", None), ("identity", IDENTITY)):
            cases[f"{way}: {name}"] = case(config, block, steps=STEPS)
    for name, block in (("dense", None), ("none", NONE)):
        cases[f"zero.Init: {name}"] = case({**zero(3, **LOW), **BF16}, block, init=True)
    for name, more in (("hit", {"overflow": 2}), ("clean", {"leave_out": 2})):
        cases[f"overflow: {name}"] = case({**zero(3, **LOW), **FP16}, EF, steps=6, **more)
    for name, block in (("dense", None), ("coded", {**CODED, "warmup_steps": STEPS})):
        cases[f"warm-up: {name}"] = case(zero(3, **LOW), block, steps=STEPS)
    gather = {"stage3_gather_16bit_weights_on_model_save": True}
    config = {**zero(3, **LOW, **gather), "gradient_accumulation_steps": 2}
    cases["coded"] = case(config, CODED, steps=8, half="half")
    cases["uncoded"] = case(config, None, steps=8)
    cases["coded, bf16, offloaded"] = case({**WAYS["offloaded"], **BF16}, CODED, steps=6)
    found = run_cases(folder, cases, timeout=280)
    return found, torch.load(folder / "half" / "pytorch_model.bin", weights_only=True)


@pytest.mark.parametrize("way", WAYS)
def test_an_identity_codec_trains_as_deepspeed_without_the_plugin(runs, way):
    dense, compressed = runs[0][f"{way}: dense"], runs[0][f"{way}: identity"]
    assert compressed[0]["compressed"] and compressed[0]["sent"] > 0
    torch.testing.assert_close(compressed[0]["weights"], dense[0]["weights"], rtol=0, atol=1e-6)
    assert torch.equal(compressed[0]["weights"], compressed[1]["weights"])


def test_what_is_not_compressed_is_scattered_as_deepspeed_does_it_under_zero_init_too(runs):
    dense, none = runs[0]["zero.Init: dense"][0], runs[0]["zero.Init: none"]
    assert torch.equal(none[0]["weights"], dense["weights"]) and none[0]["losses"] == dense["losses"]
    sent = sum(report["sent"] for report in none) / 2
    assert sent == pytest.approx(STEPS * 2 * none[0]["weights"].numel() / 2, rel=0.01)  # half of bf16, once


def test_gradients_and_parameters_travel_as_they_are_in_the_warm_up(runs):
    dense, coded = runs[0]["warm-up: dense"][0], runs[0]["warm-up: coded"][0]
    assert torch.equal(coded["weights"], dense["weights"]) and coded["sent of weights"] == 0


def test_an_fp16_overflow_is_skipped_on_every_rank_and_leaves_no_trace(runs):
    for hit, clean in zip(runs[0]["overflow: hit"], runs[0]["overflow: clean"], strict=True):
        assert hit["skipped"] == [0, 0, 1, 1, 1, 1] and hit["step"] == 5
        torch.testing.assert_close(hit["weights"], clean["weights"], rtol=0, atol=1e-6)
        for name, pieces in clean["residuals"].items():
            for start, residual in pieces.items():
                torch.testing.assert_close(hit["residuals"][name][start], residual, rtol=1e-2, atol=1e-6)


def test_parameters_are_fetched_as_codes_alike_on_every_rank_and_in_every_pass_of_a_step(runs):
    first, second = runs[0]["coded"]
    for mine, theirs in zip(first["computed"], second["computed"], strict=True):
        assert torch.equal(mine, theirs) and torch.equal(mine, first["computed"][0])
    assert torch.equal(first["weights"], second["weights"])
    start = 64 * 48 + 2 * 48
    exact, block = first["weights"][start : start + 2 * 48 * 48], 64
    assert torch.equal(first["evaluated"].view(-1), exact)
    # The last pass was before the last step, of at most lr; a code is off by a level of its block at most.
    wrong = (first["computed"][0].view(-1) - exact).view(-1, block).abs()
    level = exact.view(-1, block).abs().amax(1, keepdim=True) / 127
    assert 2e-3 < wrong.max() and (wrong <= 1.1 * level + 2e-3).all()


def test_coded_parameters_train_and_are_saved_exactly(runs):
    found, half = runs
    coded, uncoded = found["coded"][0], found["uncoded"][0]
    assert abs(coded["losses"][-1] - uncoded["losses"][-1]) < 0.1 * (uncoded["losses"][0] - uncoded["losses"][-1])
    names = ["embed.weight", "norm.weight", "norm.bias", "first.weight", "first.bias"]
    names += ["second.weight", "second.bias", "head.weight", "head.bias"]
    assert torch.equal(torch.cat([half[name].float().view(-1) for name in names]), coded["weights"])
    offloaded = found["coded, bf16, offloaded"]
    assert offloaded[0]["losses"][-1] < offloaded[0]["losses"][0]
    assert torch.equal(offloaded[0]["weights"], offloaded[1]["weights"])


def test_bytes_are_those_of_the_plan(runs):
    coded = runs[0]["coded"]
    weights = sum(report["sent of weights"] for report in coded) / 2
    gradients = sum(report["sent"] for report in coded) / 2 - weights
    assert gradients == pytest.approx(8 * 2 * coded[0]["planned"], rel=0.02)
    once, dense = coded[0]["fetched once"]
    fetches = weights / once  # of all coded parameters
    assert once < 0.35 * dense and 8 * 2 <= fetches <= 8 * 2 * 2  # in forward, and again in backward if released
