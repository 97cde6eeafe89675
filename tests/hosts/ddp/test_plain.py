"""An unmodified script trains under every scheme, and every option of DDP means what it means without the plugin."""

from __future__ import annotations

import pytest

from compression_plugins.schemes import registry

from .job import run_cases

#: Options of scripts/plain.py. torch itself fails where buckets are smaller than 1 MiB and the model is compiled.
OPTIONS = {
    "plain": [],
    "adam": ["--optimizer", "adam"],
    "accumulate": ["--accumulate", "3"],
    "find unused": ["--find-unused"],
    "find unused, buckets, accumulate": ["--find-unused", "--bucket-cap-mb", "0.05", "--accumulate", "2"],
    "static graph": ["--static-graph"],
    "static graph, unused": ["--static-graph", "--find-unused"],
    "bucket view": ["--gradient-as-bucket-view", "--bucket-cap-mb", "0.03"],
    "bucket view, unused": ["--gradient-as-bucket-view", "--find-unused"],
    "buffers": ["--buffers"],
    "autocast": ["--autocast", "bf16"],
    "compile": ["--compile", "aot_eager"],
    "join": ["--join"],
    "join, unused, buffers": ["--join", "--find-unused", "--buffers", "--bucket-cap-mb", "0.05"],
    "fp64": ["--fp64"],
    "channels last": ["--channels-last"],
}
#: Travels through the plan's buckets and our transport, in no other form than under DDP alone.
DENSE = {"scheme": "topk", "exempt": ["*"], "bucket_mb": 0.05}
#: Error feedback, and a leader in turn: a rank whose clock is wrong picks other coordinates than the others.
COMPRESSED = {"scheme": "scalecom", "ratio": 10, "min_numel": 0, "bucket_mb": 0.05}
SCHEMES = {
    name: {"scheme": name, "min_numel": 0, **({"ratio": 10} if name in ("scalecom", "topk", "randomk") else {})}
    for name in registry.names()
}
#: Unbiased and so noisy that this learning rate is too large for them.
NOISY = ("ssdm", "cascading_ssdm")
STEPS = ["--steps", "8"]
LONG = ["--steps", "25"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    cases = {}
    for name, arguments in OPTIONS.items():
        cases[f"{name}: stock"] = [STEPS + arguments, None]
        cases[f"{name}: dense"] = [STEPS + arguments, DENSE]
        cases[f"{name}: compressed"] = [STEPS + arguments, COMPRESSED]
    cases["start"] = [["--steps", "1"], None]
    for name, config in SCHEMES.items():
        cases[name] = [LONG, config]
    return {name: both[0] for name, both in run_cases(tmp_path_factory.mktemp("plain"), "many.py", cases).items()}


@pytest.mark.parametrize("option", OPTIONS)
def test_what_is_exempt_travels_bit_for_bit_as_under_ddp_alone(trained, option):
    stock, dense = trained[f"{option}: stock"], trained[f"{option}: dense"]
    assert dense["parameters"] == stock["parameters"] and dense["loss"] == stock["loss"]
    assert not stock["said"] and "exempt '*'" in dense["said"]


@pytest.mark.parametrize("option", OPTIONS)
def test_replicas_stay_equal_under_a_scheme_with_error_feedback(trained, option):
    stock, compressed = trained[f"{option}: stock"], trained[f"{option}: compressed"]
    assert compressed["equal"]
    assert (compressed["parameters"] == stock["parameters"]) == (option == "fp64")  # wider than what is compressed
    assert compressed["loss"] < 1.5 * stock["loss"]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_scheme_trains_equal_replicas(trained, scheme):
    report = trained[scheme]
    assert report["equal"]
    assert f"DDP: {scheme} on 2 ranks, 6 tensors" in report["said"]
    if registry.get(scheme).trains and scheme not in NOISY:
        assert report["loss"] < trained["start"]["loss"]


def test_the_plans_buckets_are_those_of_bucket_mb_whatever_ddps_are(trained):
    said = {name: trained[f"{name}: compressed"]["said"].split(" buckets")[0] for name in ("plain", "bucket view")}
    assert said["plain"] == said["bucket view"]
    assert said["plain"].endswith("26,122 values, 4")
