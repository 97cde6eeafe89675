"""Rates by work: what is counted, what is exempt, and how the rule compares with the paper's figures."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml
from torch import Tensor, nn

from compression_plugins.advise.layer_ratios import LayerRatio, ratio_of, rules_yaml, scalecom_ratios
from compression_plugins.config import Config
from compression_plugins.engine.plan import TensorSpec, make_plan
from compression_plugins.errors import ConfigError


class Everything(nn.Module):
    """One of each kind of layer, on 12 tokens a sample."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(100, 64)
        self.positions = nn.Parameter(torch.zeros(12, 128))
        self.lstm = nn.LSTM(64, 64, batch_first=True)
        self.block = nn.TransformerEncoderLayer(64, 2, 128, batch_first=True)
        self.first = nn.Conv1d(64, 64, 3, groups=2, padding=1)
        self.second = nn.Conv1d(64, 64, 3, stride=2, padding=1)
        self.frozen = nn.Linear(64, 64).requires_grad_(False)
        self.norm = nn.BatchNorm1d(64)
        self.head = nn.Linear(64, 100)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.block(self.lstm(self.embed(tokens) + self.positions[:, :64])[0])
        x = self.norm(self.second(self.first(self.frozen(x).transpose(1, 2))))
        return self.head(x.mean(2))


def rates(model: nn.Module, batch: object) -> dict[str, LayerRatio]:
    return {rate.name: rate for rate in scalecom_ratios(model, batch)}


def test_work_is_multiply_adds_a_weight_and_sample_for_every_kind_of_layer() -> None:
    found = rates(Everything(), torch.zeros(32, 12, dtype=torch.long))
    tokens = ["lstm.weight_ih_l0", "lstm.weight_hh_l0", "block.self_attn.in_proj_weight"]
    tokens += ["block.self_attn.out_proj.weight", "block.linear1.weight", "block.linear2.weight", "first.weight"]
    expected = dict.fromkeys(tokens, 12.0) | {"second.weight": 6.0, "head.weight": 1.0}
    assert {name: rate.work for name, rate in found.items() if rate.work} == pytest.approx(expected)


def test_first_convolution_embedding_and_unused_weights_travel_as_they_are() -> None:
    found = rates(Everything(), torch.zeros(32, 12, dtype=torch.long))
    exempt = {name: rate.reason for name, rate in found.items() if rate.ratio is None}
    assert exempt == {
        "embed.weight": "embedding",
        "positions": "no matrix product uses it",
        "first.weight": "first convolution",
    }
    assert not any(name.startswith(("norm", "frozen")) or name.endswith("bias") for name in found)


def test_more_samples_a_worker_are_more_work_and_gentler_rates() -> None:
    model = nn.Linear(64, 64)
    few, many = (rates(model, torch.zeros(rows, 64))["weight"] for rows in (32, 32 * 200))
    assert (few.work, many.work) == (1.0, 200.0)
    assert (few.ratio, many.ratio) == (400, 25)


def test_the_model_is_left_as_it_was() -> None:
    model = Everything().train()
    model.norm.eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    rates(model, (torch.zeros(2, 12, dtype=torch.long),))
    assert model.training and model.lstm.training and not model.norm.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_the_printed_rules_make_a_plan_that_follows_them() -> None:
    model = Everything()
    found = scalecom_ratios(model, {"tokens": torch.zeros(32, 12, dtype=torch.long)})
    config = Config.load({"scheme": "scalecom", "beta": 0.5, **yaml.safe_load(rules_yaml(found))})
    specs = [TensorSpec(n, tuple(p.shape), "float32") for n, p in model.named_parameters() if p.requires_grad]
    rows = {row.name: row.scheme for row in make_plan(config, specs).rows}
    for rate in found:
        assert rows[rate.name].name == ("none" if rate.ratio is None else "scalecom")
        assert rate.ratio is None or (rows[rate.name].ratio, rows[rate.name].beta) == (rate.ratio, 0.5)


def test_names_with_characters_of_patterns_match_themselves_only() -> None:
    assert LayerRatio("a[0].w*", 1.0, 400, "").rule["match"] == "a[[]0].w[*]"


def test_a_model_that_fails_is_one_error_and_keeps_its_mode() -> None:
    model = Everything().train()
    with pytest.raises(ConfigError, match="rates: the forward pass failed: "):
        scalecom_ratios(model, torch.zeros(3))
    assert model.training
    with pytest.raises(ConfigError, match="a torch.nn.Module, not of int"):
        scalecom_ratios(3, torch.zeros(3))  # type: ignore[arg-type]


@pytest.mark.nightly
def test_the_command_prints_rules_and_refuses_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text(
        "import torch\ndef example(): return torch.nn.Linear(64, 64), torch.zeros(32, 64)\ndef wrong(): return 3\n"
    )
    command = [sys.executable, "-m", "compression_plugins", "rates"]
    done = subprocess.run([*command, "net:example"], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert yaml.safe_load(done.stdout) == {"rules": [{"match": "weight", "ratio": 400}]}
    for name, message in {
        "net:wrong": "must return (model, batch)",
        "net:no": "no attribute",
        "absent:f": "No module",
    }.items():
        done = subprocess.run([*command, name], cwd=tmp_path, capture_output=True, text=True)
        assert (done.returncode, done.stderr.count("\n")) == (2, 1) and message in done.stderr


def test_the_page_shows_what_the_command_prints(tmp_path: Path) -> None:
    page = (Path(__file__).parents[2] / "docs/methods/scalecom.md").read_text(encoding="utf-8")
    (tmp_path / "net.py").write_text(page.split("```python\n")[1].split("```")[0])
    assert "compression-plugins rates net:example" in page
    command = [sys.executable, "-m", "compression_plugins", "rates", "net:example"]
    printed = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    assert printed.partition("\n")[2] in page


# --- the paper's whole-model rates, from its layers: (weights, output positions), the first convolution first


def resnet(blocks: tuple[int, ...], bottleneck: bool) -> Iterator[tuple[int, int]]:
    yield 3 * 64 * 49, 112**2
    channels, side = 64, 56
    for stage, (count, width) in enumerate(zip(blocks, (64, 128, 256, 512))):
        for block in range(count):
            before, side = side, side // 2 if stage and not block else side
            out = 4 * width if bottleneck else width
            if bottleneck:
                yield from [(channels * width, before**2), (9 * width * width, side**2), (width * out, side**2)]
            else:
                yield from [(9 * channels * width, side**2), (9 * width * width, side**2)]
            if channels != out:
                yield channels * out, side**2
            channels = out
    yield channels * 1000, 1


def mobilenet_v2() -> Iterator[tuple[int, int]]:
    yield 3 * 32 * 9, 112**2
    channels, side = 32, 112
    blocks = [(1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1)]
    for expansion, out, count, stride in blocks:
        for block in range(count):
            hidden = channels * expansion
            if expansion > 1:
                yield channels * hidden, side**2
            side //= 1 if block else stride
            yield from [(9 * hidden, side**2), (hidden * out, side**2)]
            channels = out
    yield from [(channels * 1280, side**2), (1280 * 1000, 1)]


@pytest.mark.parametrize(
    ("layers", "weights", "ours", "paper"),
    [
        (resnet((2, 2, 2, 2), False), 11_678_912, 116, 112),
        (resnet((3, 4, 6, 3), True), 25_502_912, 97, 96),
        (mobilenet_v2(), 3_469_760, 166, 155),
    ],
    ids=["resnet18", "resnet50", "mobilenet_v2"],
)
def test_the_rule_gives_about_the_rates_that_the_paper_prints(
    layers: Iterator[tuple[int, int]], weights: int, ours: int, paper: int
) -> None:
    table = list(layers)
    assert sum(n for n, _ in table) == weights
    rate = weights / (table[0][0] + sum(n / ratio_of(positions) for n, positions in table[1:]))
    assert round(rate) == ours
    assert rate == pytest.approx(paper, rel=0.08)
