"""Nothing that a gradient said gets lost between a DDP model, its optimizer and the memory; and what a step is."""

from __future__ import annotations

import pytest

from .job import run_cases

SIGNS = {"scheme": "ef_signsgd", "block": 32, "min_numel": 0, "bucket_mb": 0.01}
LEADERS = {"scheme": "scalecom", "ratio": 8, "min_numel": 0, "bucket_mb": 0.01}
FACTORS = {"scheme": "powersgd", "min_numel": 0, "bucket_mb": 0.01}
UNUSED = {"find_unused_parameters": True}
SMALL = {"bucket_cap_mb": 0.001}
WHO = [0, 1, "nobody", "all"]

#: Trainings at learning rate 1, after which computed = applied + remembered, to the rounding of fp32.
TRAININGS = {
    "plain": {"config": SIGNS, "branch": ["all"]},
    "buckets": {"config": LEADERS, "branch": ["all"], **SMALL},
    "unused": {"config": SIGNS, "branch": WHO, **UNUSED, **SMALL},
    "unused, bucket view": {"config": LEADERS, "branch": WHO, "gradient_as_bucket_view": True, **UNUSED},
    "never used": {"config": SIGNS, **UNUSED},
    "static graph": {"config": LEADERS, "static_graph": True, **SMALL},
    "no_sync": {"config": SIGNS, "branch": ["all"], "micro": 3, **SMALL},
    "synchronized micro-batches": {"config": SIGNS, "branch": ["all"], "micro": 2, "sync": True},
    "dropped": {"config": SIGNS, "branch": ["all"], "drop": "none"},
    "dropped, zeros": {"config": LEADERS, "branch": ["all"], "drop": "zeros"},
    "dropped, bucket view": {"config": SIGNS, "branch": ["all"], "drop": "none", "gradient_as_bucket_view": True},
    "scaler": {"config": SIGNS, "branch": ["all"], "scaler": True},
    "channels last": {"config": LEADERS, "image": True, **UNUSED},
    "join": {"config": LEADERS, "branch": ["all"], "join": True, **SMALL},
    "join, unused": {"config": SIGNS, "branch": WHO, "join": True, **UNUSED},
    "join, no_sync": {"config": LEADERS, "branch": ["all"], "join": True, "micro": 2, **SMALL},
}
#: Here DDP itself loses what joined ranks do not add again, so the law is that of DDP.
SHADOWED = {"branch": ["all"], "join": True, "micro": 2, "sync": True, "drop": "none"}
RESUMED = (LEADERS, {"scheme": "double_quantization", "mu": 1e4, "snapshot_steps": 4, "min_numel": 0})
DIRECTIONS = ("momentum", "frozen_adam")
OTHERS = ("second_moments", "two_models", "two_optimizers", "quantized_weights", "sparse", "kept", "refusals")


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    cases = {name: ["train", options] for name, options in TRAININGS.items()}
    cases |= {law: [law, {}] for law in OTHERS}
    cases |= {f"{kind}, {s}": ["directions", {"kind": kind, "scaler": s}] for kind in DIRECTIONS for s in (False, True)}
    cases |= {f"resume {config['scheme']}": ["resume", {"config": config}] for config in RESUMED}
    whole = {"scheme": "randomk", "ratio": 1, "min_numel": 0}  # all coordinates, in an order that the step seeds
    cases |= {f"shadowed {config is None}": ["train", {"config": config, **SHADOWED}] for config in (None, whole)}
    return run_cases(tmp_path_factory.mktemp("two"), "laws.py", cases)


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    unused = {"branch": [2, 0, "nobody", 1], **UNUSED, **SMALL}
    cases = {
        "scalecom": ["train", {"config": LEADERS, **unused}],
        "powersgd": ["train", {"config": FACTORS, **unused}],
        "join": ["train", {"config": LEADERS, "join": True, **unused}],
        "two_models": ["two_models", {}],
    }
    return run_cases(tmp_path_factory.mktemp("three"), "laws.py", cases, ranks=3)


@pytest.mark.parametrize("name", TRAININGS)
def test_what_was_computed_was_applied_or_is_remembered(two, name):
    for report in two[name]:
        assert report["missing"] < 2e-5
        assert report["norm"] > 0
    assert len({report["digest"] for report in two[name]}) == 1


@pytest.mark.parametrize("name", ["scalecom", "powersgd", "join"])
def test_three_ranks_of_which_one_at_a_time_uses_a_branch_lose_nothing_in_two_phases(three, name):
    for report in three[name]:
        assert report["missing"] < 2e-5
    assert len({report["digest"] for report in three[name]}) == 1


def test_a_rank_that_has_left_keeps_the_time_of_accumulating_and_dropping_ranks(two):
    for stock, compressed in zip(two["shadowed True"], two["shadowed False"]):
        assert compressed["digest"] == pytest.approx(stock["digest"], abs=1e-4)


def test_a_step_is_what_an_optimizer_did(two, three):
    steps = {name: {report["step"] for report in two[name]} for name in TRAININGS}
    assert steps["plain"] == steps["no_sync"] == steps["synchronized micro-batches"] == {9}
    assert steps["dropped"] == steps["dropped, zeros"] == steps["dropped, bucket view"] == {6}
    assert steps["scaler"] == {8}  # the one with an infinite loss is as if it had not been
    assert steps["join"] == steps["join, unused"] == {12} and {report["step"] for report in three["join"]} == {15}
    assert {report["step"] for report in two["two_optimizers"]} == {6}
    assert two["two_optimizers"][0]["missing"] < 2e-5


@pytest.mark.parametrize("scheme", [config["scheme"] for config in RESUMED])
def test_a_run_that_is_resumed_ends_bit_for_bit_as_one_that_was_not(two, scheme):
    for report in two[f"resume {scheme}"]:
        assert report["resumed"] == [report["straight"]] * 2
        assert "give a list of all ranks' states instead" in report["refused"]


@pytest.mark.parametrize("world", ["two", "three"])
def test_two_models_in_one_process_do_not_wait_for_each_other(world, request):
    for report in request.getfixturevalue(world)["two_models"]:
        assert report["equal"]
        assert report["steps"] == [5, 5]


def test_weights_are_quantized_inside_forward_and_exact_for_everybody_else(two):
    for report in two["quantized_weights"]:
        exact = 16 * 64
        assert report["inside"][:2] == [exact, exact]  # no step yet, and a snapshot
        assert max(report["inside"][2:4]) < 256
        assert report["outside"] and report["same"] and report["saved"] and report["evaluation"]


def test_a_sparse_embedding_travels_as_it_is(two):
    for report in two["sparse"]:
        assert report["compressed"] == report["stock"]


def test_gradients_that_a_script_keeps_are_its_own(two):
    for report in two["kept"]:
        assert all(report.values()), report


@pytest.mark.parametrize("scaler", [False, True], ids=["", "scaler"])
@pytest.mark.parametrize("kind", DIRECTIONS)
def test_a_direction_behind_plain_sgd_is_the_optimizer_itself_whatever_the_loss_scale(two, kind, scaler):
    for report in two[f"{kind}, {scaler}"]:
        assert report["gap"] < 1e-5
        assert report["step"] == (7 if scaler else 8)


def test_one_rank_has_its_direction_too(tmp_path):
    cases = {"alone": ["directions", {"kind": "frozen_adam", "scaler": False}]}
    assert run_cases(tmp_path, "laws.py", cases, ranks=1)["alone"][0]["gap"] < 1e-5


def test_an_optimizer_with_moments_of_its_own_is_refused_before_it_steps(two):
    for report in two["second_moments"]:
        assert report["kept"] and "Adam is another optimizer: use torch.optim.SGD(lr=...)" in report["said"]


def test_what_is_refused_says_why(two):
    said = two["refusals"][0]
    expected = {
        "not ddp": "needs a DistributedDataParallel, not a Linear",
        "skip": "skip_all_reduce_unused_params= leaves buckets out",
        "unknown": "did you mean 'ratio'",
        "taken": "has a communication hook already",
        "built in": "has a communication hook already",
        "twice": "has a communication hook already",
        "nothing": "nothing compresses this model",
        "frozen": "True",
        "divided": "join(divide_by_initial_world_size=False)",
    }
    assert {name for name, text in expected.items() if text not in said.get(name, "")} == set()
