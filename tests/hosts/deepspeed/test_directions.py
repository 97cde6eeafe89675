"""Momentum before compression, in real jobs: with exact averages it is DeepSpeed's own SGD with momentum."""

from __future__ import annotations

import pytest
import torch

from .job import run_cases
from .test_training import FP16, zero

PATHS = {
    "stage 0": zero(0),
    "stage 1": zero(1),
    "stage 2": zero(2),
    "stage 2, small buckets": zero(2, overlap_comm=True, reduce_bucket_size=5000),
}
BLOCK = {"scheme": "marsit", "flush_steps": 1, "direction": "momentum"}  # exempts biases and norms, which follow suit


def case(config: dict, momentum: float, block: dict | None = None, **more) -> dict:
    own = {"communication_compression": block} if block else {}
    base = {"train_micro_batch_size_per_gpu": 16, "steps_per_print": 1000, "gradient_clipping": 0.0}
    base["zero_allow_untested_optimizer"] = True  # DeepSpeed's word for SGD with ZeRO
    sgd = {"optimizer": {"type": "SGD", "params": {"lr": 0.5, "momentum": momentum}}}
    return {"config": {**base, **sgd, **config, **own}, "steps": 6, **more}


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    cases = {}
    for path, config in PATHS.items():
        cases[f"{path}: host"] = case(config, 0.9)
        cases[f"{path}: local"] = case(config, 0.0, BLOCK)
    block = {**BLOCK, "flush_steps": 50, "warmup_steps": 6}
    for path in ("stage 0", "stage 2, small buckets"):
        cases[f"{path}: warm-up"] = case(PATHS[path], 0.0, block)
    dense = {"scheme": "none", "direction": "momentum"}
    cases |= {f"{path}: dense": case(PATHS[path], 0.0, dense) for path in PATHS}
    adam = {"type": "Adam", "params": {"lr": 0.01, "torch_adam": True, "adam_w_mode": False}}
    plain = {"type": "SGD", "params": {"lr": 0.01}}
    shared = {"scheme": "ef_signsgd", "direction": "frozen_adam", "warmup_steps": 6}
    cases["adam: host"] = case({**zero(0), "optimizer": adam}, 0.0)
    cases["adam: shared"] = case({**zero(0), "optimizer": plain}, 0.0, shared)
    cases["saved"] = case(zero(2), 0.0, BLOCK, save="momentum", save_step=3)
    cases["resumed"] = case(zero(2), 0.0, BLOCK, load="momentum")
    cases["hit"] = case({**zero(2), **FP16}, 0.0, BLOCK, overflow=3)
    cases["left out"] = case({**zero(2), **FP16}, 0.0, BLOCK, leave_out=3)
    return run_cases(tmp_path_factory.mktemp("directions"), cases, timeout=280)


@pytest.mark.parametrize("path", PATHS)
def test_exact_averages_of_local_momentum_train_as_the_hosts_momentum(reports, path):
    host = reports[f"{path}: host"][0]
    for how in ("local", "warm-up", "dense"):
        if f"{path}: {how}" in reports:
            local = reports[f"{path}: {how}"][0]
            assert local["sent"] > 0 and local["losses"][-1] < local["losses"][0]
            torch.testing.assert_close(local["weights"], host["weights"], rtol=1e-4, atol=1e-5)


def test_a_frozen_variance_begins_as_the_hosts_adam(reports):
    host, shared = reports["adam: host"][0], reports["adam: shared"][0]
    torch.testing.assert_close(shared["weights"], host["weights"], rtol=1e-4, atol=1e-5)


def test_a_checkpoint_keeps_the_momentum(reports):
    assert torch.equal(reports["resumed"][0]["weights"], reports["saved"][0]["weights"])


def test_an_overflow_that_is_skipped_leaves_the_momentum_as_it_was(reports):
    assert reports["hit"][0]["skipped"][-1] == 1
    torch.testing.assert_close(reports["hit"][0]["weights"], reports["left out"][0]["weights"], rtol=0, atol=1e-6)
