"""Shapes from formulas against the numbers that the papers and the libraries print."""

from __future__ import annotations

from pathlib import Path

import pytest

from compression_plugins.advise import shapes
from compression_plugins.errors import ConfigError
from launch.task import perceptron


@pytest.mark.parametrize(
    ("name", "numel", "tensors"),
    [
        ("resnet50", 25_557_032, 161),  # torchvision.models.resnet50
        ("gpt2", 124_439_808, 148),  # transformers.GPT2LMHeadModel, head tied
        ("bert-large", 336_226_108, 398),  # transformers.BertForPreTraining of bert-large-uncased, head tied
        ("mlp", 5_824_522, 6),
    ],
)
def test_a_network_has_as_many_parameters_as_the_published_one(name: str, numel: int, tensors: int) -> None:
    found = shapes.load(name)
    assert (found.numel, len(found.specs)) == (numel, tensors)
    assert len({spec.name for spec in found.specs}) == tensors


def test_the_perceptron_is_the_demonstration_s() -> None:
    model = [(name, tuple(p.shape)) for name, p in perceptron().named_parameters()]
    assert [(spec.name, spec.shape) for spec in shapes.shapes("mlp")] == model


def test_flops_are_six_a_weight_and_position_less_the_gradient_of_the_data() -> None:
    assert shapes.flops("mlp") == 6 * (784 * 2048 + 2048 * 2048 + 2048 * 10) - 2 * 784 * 2048
    resnet = shapes.flops("resnet50")
    assert resnet is not None
    assert resnet / 6 == pytest.approx(4.09e9, rel=0.02)  # multiply-adds of a forward pass at 224 x 224
    gpt2, tokens, weights = shapes.flops("gpt2"), 1024, 124_439_808 - 1024 * 768
    assert gpt2 == pytest.approx(6 * tokens * weights + 12 * 12 * 768 * tokens**2, rel=0.01)  # 6 N a token, and scores


def test_a_file_keeps_its_order_and_has_no_flops(tmp_path: Path) -> None:
    path = tmp_path / "net.yaml"
    path.write_text("b.weight: [3, 4]\na.weight: [5]\n")
    assert [(spec.name, spec.shape) for spec in shapes.shapes(str(path))] == [("b.weight", (3, 4)), ("a.weight", (5,))]
    assert shapes.flops(str(path)) is None


@pytest.mark.parametrize("text", ["a: [0, 3]", "a: 7", "a: [2.0]", "1: [2]", "{}", "a: ['3']"])
def test_a_line_that_is_no_shape_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "net.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match="write `name|key must be a text"):
        shapes.load(str(path))


def test_an_unknown_network_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean 'gpt2'"):
        shapes.load("gpt3")
