"""Old configs in real jobs: 1-bit optimizers and LoCo, as DeepSpeed documented them, without a word of ours."""

from __future__ import annotations

import inspect
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from compression_plugins.adapters.deepspeed import zeropp
from compression_plugins.optimizer import one_bit

from .job import run_cases
from .test_training import BF16, zero

BASE = {"train_micro_batch_size_per_gpu": 16, "steps_per_print": 1000, "gradient_clipping": 1.0}
#: Every parameter that DeepSpeed's pages name, with short phases. 12 steps.
OLD = {
    "OneBitAdam": {"freeze_step": 4, "cuda_aware": False, "comm_backend_name": "nccl"},
    "OneBitLamb": {
        "freeze_step": 4,
        "coeff_beta": 0.8,
        "factor_max": 4.0,
        "factor_min": 0.5,
        "factor_threshold": 0.1,
        "bias_correction": False,
        "max_coeff": 0.3,
        "min_coeff": 0.01,
        "comm_backend_name": "mpi",
    },
    "zerooneadam": {
        "var_freeze_step": 8,
        "var_update_scaler": 2,
        "local_step_scaler": 4,
        "local_step_clipper": 2,
        "weight_decay": 0.01,
        "bias_correction": False,
        "cuda_aware": True,
    },
}
LOCO = {**zero(2, zero_quantized_gradients=True, zeropp_loco_param={"err_beta": 0.8, "reset_T": 5})}

TEXT = (Path(__file__).parents[3] / "docs/migrate-from-deepspeed-1bit.md").read_text(encoding="utf-8")
PAGE = [json.loads(block) for block in re.findall(r"```json\n(.*?)```", TEXT, re.DOTALL)]


def case(kind: str, config: dict[str, Any] | None = None, steps: int = 12, **more: Any) -> dict[str, Any]:
    parameters = {"lr": 0.01, **(OLD.get(kind) or more.pop("params", {}))}
    return {
        "config": {**BASE, "optimizer": {"type": kind, "params": parameters}, **(config or {})},
        "steps": steps,
    } | more


def adam(config: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    return case("Adam", config, params={"torch_adam": True, "weight_decay": 0.01}, steps=6, **more)


def warm(kind: str, config: dict[str, Any] | None = None) -> dict[str, Any]:
    return case(kind.upper(), config, params={"weight_decay": 0.01}, steps=6)


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    cases = {"adam": adam(), "adam, bf16": adam(BF16)}
    cases |= {"warm OneBitAdam": warm("OneBitAdam"), "warm ZeroOneAdam": warm("ZeroOneAdam")}
    cases["warm OneBitAdam, bf16"] = warm("OneBitAdam", BF16)
    for kind in OLD:
        cases[kind] = case(kind, save=kind, save_step=6)
        cases[f"{kind}, resumed"] = case(kind, load=kind)
    cases["hit"], cases["left out"] = (case("OneBitAdam", BF16, **{how: 6}) for how in ("overflow", "leave_out"))
    block = {"communication_compression": {"scheme": "ecq_sgd", "bits": 4, "alpha": 0.2, "reset_steps": 5}}
    plain = {"params": {"torch_adam": True}, "steps": 8}
    cases["loco"], cases["block"] = case("Adam", LOCO, **plain), case("Adam", {**zero(2), **block}, **plain)
    cases |= {f"page {i}": {"config": {**config, "steps_per_print": 1000}, "steps": 6} for i, config in enumerate(PAGE)}
    return run_cases(tmp_path_factory.mktemp("one_bit"), cases, timeout=280)


@pytest.mark.parametrize("name", ["OneBitAdam", "ZeroOneAdam", "OneBitAdam, bf16"])
def test_before_the_freeze_they_are_the_hosts_adam_bit_for_bit(reports: dict[str, Any], name: str) -> None:
    host = reports["adam, bf16" if "bf16" in name else "adam"][0]
    assert not host["compressed"]
    assert torch.equal(reports[f"warm {name}"][0]["weights"], host["weights"])
    assert reports[f"warm {name}"][0]["losses"] == host["losses"]


@pytest.mark.parametrize("kind", OLD)
def test_after_it_they_learn_on_far_fewer_bytes_and_ranks_hold_the_same_bits(
    reports: dict[str, Any], kind: str
) -> None:
    one, other = reports[kind]
    assert torch.equal(one["weights"], other["weights"])
    assert one["losses"][-1] < 0.9 * one["losses"][0]
    dense_steps = {"OneBitAdam": 4, "OneBitLamb": 4, "zerooneadam": 5}[kind]
    dense = one["dense"] / 12
    assert dense_steps * dense < one["sent"] < (dense_steps + 0.15 * (12 - dense_steps)) * dense


@pytest.mark.parametrize("kind", OLD)
def test_a_job_that_stops_after_the_freeze_goes_on_bit_for_bit(reports: dict[str, Any], kind: str) -> None:
    for rank in range(2):
        assert torch.equal(reports[f"{kind}, resumed"][rank]["weights"], reports[kind][rank]["weights"])


def test_a_gradient_that_is_not_finite_stays_out_of_moments_and_memory(reports: dict[str, Any]) -> None:
    hit, left = reports["hit"], reports["left out"]
    assert hit[0]["skipped"][-1] == hit[1]["skipped"][-1] == 1
    assert torch.equal(hit[0]["weights"], left[0]["weights"])
    for name, pieces in hit[1]["residuals"].items():
        assert all(piece.isfinite().all() for piece in pieces.values()), name


def test_loco_is_the_block_that_the_page_names(reports: dict[str, Any]) -> None:
    assert torch.equal(reports["loco"][0]["weights"], reports["block"][0]["weights"])
    assert reports["loco"][0]["sent"] == reports["block"][0]["sent"] > 0


@pytest.mark.parametrize("i", range(len(PAGE)))
def test_every_config_of_the_page_trains_compressed(reports: dict[str, Any], i: int) -> None:
    one, other = reports[f"page {i}"]
    assert one["compressed"] and 0 < one["sent"] < one["dense"]
    assert one["losses"][-1] < one["losses"][0]
    assert torch.equal(one["weights"], other["weights"])


def test_the_page_names_every_parameter_of_the_three() -> None:
    for name in ("OneBitAdam", "OneBitLamb", "ZeroOneAdam"):
        for key in inspect.signature(getattr(one_bit, name)).parameters:
            assert key == "params" or f"`{key}`" in TEXT, key


def test_the_page_says_which_block_loco_is() -> None:
    old, new = (next(c for c in PAGE if word in json.dumps(c)) for word in ("zeropp_loco_param", "reset_steps"))
    assert zeropp.translate(old) == new
