"""The command `compression-plugins`."""

from __future__ import annotations

import subprocess
import sys

import pytest

from compression_plugins.cli import main
from compression_plugins.config import Config
from compression_plugins.schemes import registry


def test_schemes_lists_every_registered_scheme(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["schemes"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == registry.names()
    assert main(["schemes", "--markdown"]) == 0
    table = capsys.readouterr().out
    assert all(f"| `{name}` |" in table for name in registry.names())


def test_show_prints_a_document_that_reads_back_equal(capsys: pytest.CaptureFixture[str], tmp_path) -> None:  # noqa: ANN001
    assert main(["show", "scalecom", "--set", "ratio=7", "--set", "exempt=['*.bias']"]) == 0
    path = tmp_path / "shown.yaml"
    path.write_text(capsys.readouterr().out)
    assert Config.load(path) == Config.load({"scheme": "scalecom", "ratio": 7, "exempt": ["*.bias"]})


@pytest.mark.parametrize(
    "arguments", [["show", "nope"], ["show", "qsgd", "--set", "bits=3"], ["show", "qsgd", "--set", "bits"]]
)
def test_a_mistake_prints_one_line_and_returns_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("compression-plugins: ") and error.count("\n") == 1


def test_python_m_is_the_same_command() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "compression_plugins", "schemes"], capture_output=True, text=True, check=True
    )
    assert "scalecom" in done.stdout


def test_the_rank_that_deepspeeds_launcher_puts_first_is_not_taken_for_a_command(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["--local_rank=0", "schemes"]) == 0 and "scalecom" in capsys.readouterr().out
