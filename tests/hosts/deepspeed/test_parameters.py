"""The gather of weights under ZeRO: codes of what has changed, and patches. Two real ranks against plain DeepSpeed."""

from __future__ import annotations

import pytest
import torch

from .job import run_cases
from .test_training import ACCUMULATE, BF16, FP16, case, zero

OFFLOAD = {"offload_optimizer": {"device": "cpu"}}
#: The ways on which DeepSpeed gathers weights at stages 1 and 2.
WAYS = {
    "stage 1": zero(1),
    "stage 1, bf16 with fp32 gradients": {**zero(1), **BF16, **ACCUMULATE},
    "stage 2, bf16, overlap": {**zero(2, overlap_comm=True), **BF16},
    "stage 2, fp16": {**zero(2), **FP16},
    "stage 2, offloaded": {**zero(2, **OFFLOAD), "zero_force_ds_cpu_optimizer": False},
}
QSGD = {"scheme": "qsgd", "bits": 4, "block": 64}
STEPS = 6


def block(parameters: dict, **more) -> dict:
    """Gradients travel as DeepSpeed sends them, so that weights alone can make a difference."""
    return {"scheme": "none", "min_numel": 100, "exempt": ["second*"], "parameters": parameters, **more}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    cases = {}
    for way, config in WAYS.items():
        more = {"overflow": 2} if "fp16" in way else {}
        cases[f"{way}: dense"] = case(config, steps=STEPS, **more)
        cases[f"{way}: patch"] = case(config, block({"scheme": "patch"}), steps=STEPS, **more)
        cases[f"{way}: codes"] = case(config, block(QSGD), steps=STEPS, **more)
    cases["scribbled: dense"] = case(zero(1), steps=STEPS, scribble=3)
    cases["scribbled: patch"] = case(zero(1), block({"scheme": "patch"}), steps=STEPS, scribble=3)
    cases["scribbled: codes"] = case(zero(1), block(QSGD), steps=4, scribble=3)
    cases["frozen: patch"] = case(zero(1), block({"scheme": "patch"}), steps=10, freeze=4)
    cases["frozen: codes"] = case(zero(1), block(QSGD), steps=10, freeze=4)
    cases["warm-up"] = case(zero(2), block(QSGD, warmup_steps=4), steps=4)
    cases["mu rule"] = case(zero(2), block({"scheme": "double_quantization", "mu": 200.0}), steps=STEPS)
    return run_cases(tmp_path_factory.mktemp("parameters"), cases, timeout=280)


@pytest.mark.parametrize("way", WAYS)
def test_patches_train_bit_for_bit_as_deepspeed_does(runs, way):
    for dense, patched in zip(runs[f"{way}: dense"], runs[f"{way}: patch"], strict=True):
        assert torch.equal(dense["weights"], patched["weights"]) and dense["losses"] == patched["losses"]
        assert patched["skipped"] == dense["skipped"]
        assert torch.equal(patched["evaluated"], patched["weights"])


def test_replicas_are_equal_bit_for_bit(runs):
    for name, (first, second) in runs.items():
        assert torch.equal(first["weights"], second["weights"]), name


@pytest.mark.parametrize("way", WAYS)
def test_codes_of_the_difference_train_near_the_exact_weights_and_show_them_to_whoever_looks(runs, way):
    dense, coded = runs[f"{way}: dense"][0], runs[f"{way}: codes"][0]
    assert not torch.equal(coded["weights"], dense["weights"])
    assert abs(coded["losses"][-1] - dense["losses"][-1]) < 0.1 * abs(dense["losses"][0] - dense["losses"][-1])
    assert torch.equal(coded["evaluated"], coded["master"]) and not torch.equal(coded["master"], coded["weights"])
    second = slice(64 * 48 + 2 * 48 + 2 * 48 * 49, 64 * 48 + 2 * 48 + 2 * 48 * 49 + 2 * 48 * 48)
    assert torch.equal(coded["weights"][second], coded["master"][second])  # exempt: exact on every rank


def test_what_a_code_has_lost_is_in_the_next_difference(runs):
    report = runs["frozen: codes"][0]  # for six steps the exact weights have stood still
    lost = (report["weights"] - report["master"]).abs().max()
    assert 0 < lost < 1e-7 + 1e-3 * 4 * 7**-4  # four steps of at most lr, with 1/7 of each difference left


def test_bytes_are_those_of_the_plan_and_of_no_wider_dtype(runs):
    for way in WAYS:
        coded, patched = runs[f"{way}: codes"], runs[f"{way}: patch"]
        steps = STEPS - coded[0]["skipped"][-1]
        sent = sum(report["sent"] for report in coded) / 2
        gradients = STEPS * coded[0]["planned"]
        assert sent == pytest.approx(gradients + steps * coded[0]["planned weights"], rel=1e-9), way
        dense = coded[0]["dense weights"]
        assert coded[0]["planned weights"] < 0.75 * dense, way  # a third of the values is exempt
        assert sum(report["sent"] for report in patched) / 2 - gradients <= steps * (dense + 32), way


def test_a_step_that_changes_nothing_sends_no_weights(runs):
    reports = runs["frozen: patch"]  # six of ten steps
    weights = sum(report["sent"] for report in reports) / 2 - 10 * reports[0]["planned"]
    assert weights <= 4 * (reports[0]["dense weights"] + 32) + 6 * 64


def test_weights_that_ranks_have_overwritten_differently_are_healed_as_plain_deepspeed_heals_them(runs):
    for dense, patched in zip(runs["scribbled: dense"], runs["scribbled: patch"], strict=True):
        assert torch.equal(dense["weights"], patched["weights"]) and dense["losses"] == patched["losses"]
    for report in runs["scribbled: codes"]:
        assert torch.equal(report["weights"], report["master"])


def test_weights_travel_whole_in_the_warm_up(runs):
    report = runs["warm-up"][0]  # the gather of the last warm-up step is that of the first compressed forward
    whole = 3 * report["dense weights"] + report["planned weights"]
    assert sum(r["sent"] for r in runs["warm-up"]) / 2 == pytest.approx(4 * report["planned"] + whole, rel=1e-9)


def test_the_mu_rule_is_one_setting_of_the_weights(runs):
    report = runs["mu rule"][0]
    assert report["losses"][-1] < report["losses"][0]
    assert not torch.equal(report["weights"], report["master"]) and torch.equal(report["evaluated"], report["master"])
