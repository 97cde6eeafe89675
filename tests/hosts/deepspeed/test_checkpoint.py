"""A job that stops and goes on trains as if it had never stopped."""

from __future__ import annotations

import pytest
import torch

from .job import run_cases
from .test_training import BASE, BF16, zero

SCALECOM = {"scheme": "scalecom", "ratio": 20, "beta": 0.5, "min_numel": 0}
QSGD = {"scheme": "qsgd", "bits": 4, "block": 64}
DOUBLE = {"scheme": "double_quantization", "min_numel": 0, "mu": 2.0, "snapshot_steps": 3}
CONFIGS = {
    "stage 0, scalecom": {"communication_compression": SCALECOM},
    "stage 1, ef_signsgd": {**zero(1), "communication_compression": {"scheme": "ef_signsgd", "min_numel": 0}},
    "stage 2, powersgd": {**zero(2), "communication_compression": {"scheme": "powersgd", "min_numel": 0}},
    "stage 2, qsgd, bf16": {**zero(2), **BF16, "communication_compression": {"scheme": "qsgd", "min_numel": 0}},
    "stage 0, double_quantization": {"communication_compression": DOUBLE},
    "stage 1, differences, bf16": {**zero(1), **BF16, "communication_compression": {**SCALECOM, "parameters": QSGD}},
    "stage 2, differences": {**zero(2), "communication_compression": {"scheme": "none", "parameters": QSGD}},
    "stage 2, patch": {**zero(2), "communication_compression": {"scheme": "none", "parameters": {"scheme": "patch"}}},
    "stage 3, ef_signsgd": {
        **zero(3, stage3_param_persistence_threshold=100),
        "communication_compression": {"scheme": "ef_signsgd", "min_numel": 0, "parameters": {**QSGD, "bits": 8}},
    },
    "stage 2, double_quantization": {**zero(2), "communication_compression": DOUBLE},
}
SAVED, END = 4, 8


def case(config: dict, **more) -> dict:
    return {"config": {**BASE, **config}, "steps": END, **more}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Uninterrupted runs, which save on the way; in new processes their continuations; and one on three ranks."""
    folder = tmp_path_factory.mktemp("checkpoint")
    whole = {name: case(config, save=name, save_step=SAVED) for name, config in CONFIGS.items()}
    resumed = {name: case(config, load=name) for name, config in CONFIGS.items()}
    name = "stage 0, scalecom"
    resumed["forgetful"] = case({"communication_compression": {**SCALECOM, "scheme": "topk", "beta": None}}, load=name)
    del resumed["forgetful"]["config"]["communication_compression"]["beta"]
    first = run_cases(folder, whole)
    files = sorted(p.name for p in (folder / "checkpoints" / name).glob("communication_compression*"))
    second = run_cases(folder, resumed)
    alone = run_cases(folder, {name: {**case(CONFIGS[name], load=name), "steps": SAVED}}, ranks=3)
    saved = [torch.load(folder / "checkpoints" / name / file, weights_only=True) for file in files]
    return first, second, alone, files, saved


@pytest.mark.parametrize("name", CONFIGS)
def test_resuming_continues_bit_for_bit(runs, name):
    first, second, *_ = runs
    for rank in range(2):
        assert torch.equal(second[name][rank]["weights"], first[name][rank]["weights"])
        assert second[name][rank]["losses"] == first[name][rank]["losses"][SAVED:]
        assert second[name][rank]["step"] == END


def test_each_rank_writes_its_own_file_beside_deepspeeds(runs):
    _, _, _, files, saved = runs
    assert files == [f"communication_compression_rank_0000{rank}_of_00002.pt" for rank in range(2)]
    one, other = (document["state"]["vectors"]["residual"]["first.weight"][0] for document in saved)
    assert not torch.equal(one, other)


def test_on_another_number_of_ranks_the_mean_residual_is_conserved(runs):
    _, _, alone, _, saved = runs
    residuals = alone["stage 0, scalecom"][0]["residuals"]
    assert residuals.keys() == saved[0]["state"]["vectors"]["residual"].keys()
    for name, pieces in residuals.items():
        mean = sum(document["state"]["vectors"]["residual"][name][0] for document in saved) / 2
        torch.testing.assert_close(pieces[0], mean, rtol=0, atol=1e-7)


def test_another_scheme_starts_with_empty_memory_and_trains_on(runs):
    _, second, *_ = runs
    assert second["forgetful"][0]["step"] == END
    assert torch.equal(second["forgetful"][0]["weights"], second["forgetful"][1]["weights"])
