"""Options: one clear error for each mistake."""

from __future__ import annotations

from pathlib import Path

import pytest

from compression_plugins.errors import ConfigError
from compression_plugins.parameter_server.algorithms import names
from compression_plugins.parameter_server.options import Options

CONFIGS = Path(__file__).parents[2] / "configs/parameter_server"


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ({"method": "asylgp"}, "unknown method 'asylgp'; did you mean 'asylpg'"),
        ({"epoch": 3}, "unknown key 'epoch'; did you mean 'epochs'"),
        ({"bits": 17}, "bits = 17: input should be less than or equal to 16"),
        ({"bits": 4.0}, "bits = 4.0: input should be a valid integer"),
        ({"lr": "0.1"}, "lr = '0.1'"),
        ({"mu": float("inf")}, "mu = inf"),
        ({"tau": -1}, "tau = -1"),
        ({"budget": 0}, "budget = 0"),
    ],
)
def test_a_mistake_is_one_clear_error(document: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match="^parameter-server options: ") as caught:
        Options.load(document)
    assert message in str(caught.value)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    for content in (b"- a list", b"a: [", b"\xff\xfe"):
        path = tmp_path / "bad.yaml"
        path.write_bytes(content)
        with pytest.raises(ConfigError, match=r"bad\.yaml"):
            Options.load(path)
    with pytest.raises(ConfigError, match="No such file"):
        Options.load(tmp_path / "none.yaml")


@pytest.mark.parametrize("name", names())
def test_every_algorithm_has_a_configuration_that_spells_out_every_key(name: str) -> None:
    import yaml

    path = CONFIGS / f"{name}.yaml"
    options = Options.load(path)
    assert options.method == name
    assert set(yaml.safe_load(path.read_text())) | {"inner_steps", "target_loss"} >= set(Options.model_fields) - {
        "budget", "theta", "mu", "bits"
    }  # fmt: skip


def test_the_digest_depends_on_what_decides_the_iterates_alone() -> None:
    one = Options.load({})
    assert one.digest(10, 5) == Options.load({"epochs": 99, "patience_s": 1.0}).digest(10, 5)
    assert one.digest(10, 5) != Options.load({"lr": 0.2}).digest(10, 5)
    assert one.digest(10, 5) != one.digest(11, 5) != one.digest(11, 6)
