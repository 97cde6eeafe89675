"""Bad input gets one clear error; good input is read the same everywhere."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

import compression_plugins
from compression_plugins.config import Config, Settings, parse_assignments, presets
from compression_plugins.config import config as config_module
from compression_plugins.errors import ConfigError
from compression_plugins.schemes import registry

CONFIGS = Path(compression_plugins.__file__).parent / "configs"

BAD: list[tuple[dict[str, Any], str]] = [
    ({}, r"key 'scheme' is missing; valid: .*scalecom"),
    ({"scheme": "scalecon"}, r"unknown scheme 'scalecon'; did you mean 'scalecom'\?"),
    ({"scheme": 3}, r"scheme must be a name, not 3"),
    ({"scheme": "scalecom", "ration": 5}, r"unknown key 'ration' for scheme 'scalecom'; did you mean 'ratio'\?"),
    ({"scheme": "scalecom", "bukket_mb": 5}, r"unknown key 'bukket_mb' .*; did you mean 'bucket_mb'\?"),
    ({"scheme": "scalecom", "ratio": "100"}, r"scheme 'scalecom': ratio = '100': input should be a valid integer"),
    ({"scheme": "scalecom", "beta": 0}, r"beta = 0.*: input should be greater than 0"),
    ({"scheme": "qsgd", "bits": 3}, r"bits = 3: input should be 2, 4 or 8"),
    ({"scheme": "qsgd", "block": 100}, r"block = 100: input should be a multiple of 32"),
    ({"scheme": "marsit", "eta_s": "automatic"}, r"eta_s = 'automatic': input should be a valid number, or be 'auto'$"),
    ({"scheme": "none", "warmup_steps": True}, r"warmup_steps = True: input should be a valid integer"),
    ({"scheme": "none", "bucket_mb": 0}, r"bucket_mb = 0: input should be greater than 0, or be 'auto'$"),
    ({"scheme": "none", "seed": -1}, r"seed = -1"),
    ({"scheme": "none", "exempt": "bias"}, r"exempt = 'bias': input should be a valid list"),
    ({"scheme": "none", "rules": {"a": 1}}, r"rules must be a list, not dict"),
    ({"scheme": "none", "rules": [{"scheme": "qsgd"}]}, r"rules\[0\]: a rule is a mapping with a text 'match'"),
    ({"scheme": "none", "rules": [{"match": "*", "scheme": "nope"}]}, r"rules\[0\]: unknown scheme 'nope'"),
    (
        {"scheme": "qsgd", "rules": [{"match": "*", "bit": 4}]},
        r"rules\[0\]: unknown key 'bit' .*; did you mean 'bits'\?",
    ),
]


@pytest.mark.parametrize(("document", "message"), BAD, ids=[json.dumps(d) for d, _ in BAD])
def test_a_mistake_is_one_line_that_names_the_nearest_valid_choice(document: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        Config.load(document)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"scheme: \xff\xfe", "is not UTF-8 text"),
        (b"scheme: [", "is not plain YAML"),
        (b"!!python/object/apply:os.system ['true']", "is not plain YAML: could not determine a constructor"),
        (b"- scalecom", "must hold a mapping, not list"),
        (b"", "must hold a mapping, not NoneType"),
    ],
)
def test_an_unreadable_file_is_one_line(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=message) as caught:
        Config.load(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_file_or_a_directory_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read .*none.yaml: No such file"):
        Config.load(tmp_path / "none.yaml")
    (tmp_path / "folder.yaml").mkdir()
    with pytest.raises(ConfigError, match="cannot read .*folder.yaml: Is a directory"):
        Config.load(tmp_path / "folder.yaml")


@pytest.mark.parametrize("name", registry.names())
def test_every_scheme_ships_a_yaml_with_each_of_its_keys_at_its_default(name: str) -> None:
    text = (CONFIGS / f"{name}.yaml").read_text(encoding="utf-8")
    document = yaml.safe_load(text)
    assert Config.load(name) == Config.load({"scheme": name})
    assert set(document) == {"scheme", *registry.get(name).model_fields, *Settings.model_fields}
    keys = [line for line in text.splitlines() if line and not line.startswith("#")]
    assert all("#" in line for line in keys if not line.startswith("scheme:")), "a comment for each key"


def test_no_yaml_is_without_a_scheme() -> None:
    assert {path.stem for path in CONFIGS.glob("*.yaml")} == set(registry.names())


@pytest.mark.parametrize("suffix", ["yaml", "yml", "json"])
def test_a_document_reads_the_same_from_a_file_and_a_dict(tmp_path: Path, suffix: str) -> None:
    document = {
        "scheme": "qsgd",
        "bits": 8,
        "seed": 5,
        "rules": [{"match": "a*", "bits": 2}, {"match": "b*", "scheme": "none"}],
    }
    path = tmp_path / f"c.{suffix}"
    path.write_text(json.dumps(document))
    config = Config.load(path)
    assert config == Config.load(document) == Config.load(config.to_dict())
    assert config.rules[0].scheme.model_dump() == {"bits": 2, "block": 512, "norm": "absmax"}
    assert config.digest() != Config.load({**document, "seed": 6}).digest()


def test_overrides_replace_keys_and_another_scheme_drops_the_old_ones() -> None:
    document = {"scheme": "qsgd", "bits": 8, "seed": 5}
    assert Config.load(document, {"bits": 2}).scheme.model_dump()["bits"] == 2
    other = Config.load(document, {"scheme": "scalecom", "ratio": 7})
    assert (other.scheme.name, other.seed) == ("scalecom", 5)


def test_environment_carries_a_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(config_module.ENVIRONMENT_VARIABLE, raising=False)
    assert config_module.from_environment() is None
    config = Config.load("marsit")
    monkeypatch.setenv(config_module.ENVIRONMENT_VARIABLE, json.dumps(config.to_dict()))
    assert config_module.from_environment() == config
    monkeypatch.setenv(config_module.ENVIRONMENT_VARIABLE, "{")
    with pytest.raises(ConfigError, match="COMPRESSION_PLUGINS_CONFIG is not JSON"):
        config_module.from_environment()


def test_reading_a_configuration_does_not_import_torch() -> None:
    code = "import sys, compression_plugins.config as c; c.Config.load('scalecom'); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_numbers_are_read_as_in_json() -> None:
    assert parse_assignments(["eta_s=1e-3", "ratio=100", "exempt=['*.bias']"]) == {
        "eta_s": 1e-3,
        "ratio": 100,
        "exempt": ["*.bias"],
    }
    for bad in ("ratio", "=3", "ratio=[", "x=!!python/object/apply:os.getcwd []"):
        with pytest.raises(ConfigError, match="KEY=VALUE|the value is not plain YAML"):
            parse_assignments([bad])


@pytest.mark.parametrize("name", sorted(presets()))
def test_a_preset_is_loaded_by_its_name_and_says_first_what_it_is_for(name: str) -> None:
    config = Config.load(name)
    assert config.scheme.name in registry.names()
    assert presets()[name].startswith("Adam on a transformer")
    assert Config.load(name, {"every": 16}).every == 16


def test_a_misspelt_preset_gets_the_nearest_one() -> None:
    with pytest.raises(ConfigError, match="did you mean 'transformer/small'"):
        Config.load("transformer/smal")
