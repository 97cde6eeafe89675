"""The key `parameters` of a configuration: what it takes, what it means, and who has no use for it."""

from __future__ import annotations

import pytest
import torch

from compression_plugins.config import Config
from compression_plugins.engine.plan import TensorSpec, weights_row
from compression_plugins.engine.session import Session
from compression_plugins.errors import ConfigError, UnsupportedError

QSGD = {"scheme": "qsgd", "bits": 4}


def load(parameters: object, **more: object) -> Config:
    return Config.load({"scheme": "topk", "parameters": parameters, **more})


def test_a_configuration_with_parameters_is_what_its_document_says() -> None:
    config = load(QSGD)
    assert config.parameters is not None and config.parameters.name == "qsgd" and config.scheme.name == "topk"
    assert Config.load(config.to_dict()) == config and Config.load(config.to_dict()).digest() == config.digest()
    assert config.digest() != load({**QSGD, "bits": 8}).digest() != Config.load("topk").digest()
    assert load("patch") == load({"scheme": "patch"})
    assert Config.load(config.to_dict(), {"scheme": "ef_signsgd"}).parameters == config.parameters
    assert "parameters" not in Config.load("topk").to_dict()


@pytest.mark.parametrize(
    ("parameters", "words"),
    [
        (7, ("parameters is a mapping", "{scheme: qsgd, bits: 4}")),
        ({"bits": 4}, ("parameters is a mapping",)),
        ({"scheme": "qsdg"}, ("unknown scheme 'qsdg'", "did you mean 'qsgd'")),
        ({"scheme": "qsgd", "bit": 4}, ("unknown key 'bit'", "did you mean 'bits'")),
        ({"scheme": "qsgd", "bits": 5}, ("parameters: scheme 'qsgd': bits = 5",)),
        ({"scheme": "patch", "bits": 4}, ("unknown key 'bits' for scheme 'patch'",)),
        ({"scheme": "topk"}, ("'topk' cannot say what has changed", "valid:", "patch", "qsgd")),
        ({"scheme": "signsgd"}, ("'signsgd' cannot say what has changed",)),
    ],
)
def test_what_parameters_cannot_be_is_one_sentence_with_the_remedy(parameters: object, words: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError) as caught:
        load(parameters)
    assert all(word in str(caught.value) for word in words), caught.value


def test_exemptions_hold_for_weights_except_where_nothing_is_lost() -> None:
    specs = {
        "big": TensorSpec("big", (64, 64), "bfloat16"),
        "head": TensorSpec("head", (64, 64), "bfloat16"),
        "bias": TensorSpec("bias", (4096,), "bfloat16"),
        "wide": TensorSpec("wide", (64, 64), "float64"),
    }
    rules = [{"match": "big", "scheme": "none"}]  # of its gradient
    coded = {n: weights_row(load(QSGD, exempt=["head"], rules=rules), s) for n, s in specs.items()}
    assert {name for name, row in coded.items() if not row.reason} == {"big"}
    assert "exempt" in coded["head"].reason and "dimensions" in coded["bias"].reason and "wider" in coded["wide"].reason
    patched = {name: weights_row(load("patch", exempt=["head"]), spec) for name, spec in specs.items()}
    assert {name for name, row in patched.items() if not row.reason} == set(specs)


def test_a_host_whose_weights_do_not_travel_refuses_the_key() -> None:
    parameters = {"w": torch.nn.Parameter(torch.zeros(64, 64))}
    with pytest.raises(UnsupportedError, match="parameters: qsgd is about weights that travel.*remove the key"):
        Session("host", load(QSGD), parameters)
    Session("host", load(QSGD), parameters, gathers=True)
