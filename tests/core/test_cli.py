"""The command `compression-plugins`."""

from __future__ import annotations

import argparse
import subprocess
import sys
import types
from importlib.metadata import EntryPoint

import pytest

from compression_plugins import cli
from compression_plugins.cli import main
from compression_plugins.config import Config, presets
from compression_plugins.schemes import registry


def test_schemes_lists_every_registered_scheme(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["schemes"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == [*registry.names(), *presets()]
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


def register(monkeypatch: pytest.MonkeyPatch, **commands: str) -> None:
    """Make these the only commands that stand outside the package: name -> module."""
    found = [EntryPoint(name, value, cli.GROUP) for name, value in commands.items()]
    monkeypatch.setattr(cli, "entry_points", lambda group: found if group == cli.GROUP else [])


def test_a_registered_module_is_a_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def add_arguments(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("word")

    def run(options: argparse.Namespace) -> int:
        print(f"said {options.word}")
        return 7

    module = types.ModuleType("outside_command", "Says a word.")
    module.__dict__.update(add_arguments=add_arguments, run=run)
    monkeypatch.setitem(sys.modules, "outside_command", module)
    register(monkeypatch, say="outside_command", schemes="outside_command")
    assert main(["say", "hello"]) == 7 and capsys.readouterr().out == "said hello\n"
    assert main(["schemes"]) == 0 and "scalecom" in capsys.readouterr().out, "nobody replaces a command of the package"
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "from outside_command" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [["bench", "some.yaml"], ["report", "results.jsonl"]])
@pytest.mark.parametrize(
    ("modules", "missing"),
    [({}, "the repository"), ({"bench": "no_such_place.bench", "report": "no_such_place.report"}, "'no_such_place'")],
)
def test_a_command_of_the_repository_says_what_it_lacks(
    arguments: list[str],
    modules: dict[str, str],
    missing: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    register(monkeypatch, **modules)
    assert main(arguments) == 2
    assert capsys.readouterr().err == (
        f"compression-plugins: {arguments[0]} needs {missing}: run it from a clone of the repository after "
        "`pip install -e '.[bench]'`\n"
    )


def test_bench_of_kernels_and_schemes_needs_no_repository(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    register(monkeypatch)
    assert main(["bench", "schemes", "--schemes", "qsgd", "--numel", "4096", "--steps", "1"]) == 0
    assert "\nqsgd " in capsys.readouterr().out
    assert main(["bench", "kernels", "--device", "cpu", "--only", "nothing"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("compression-plugins bench: no kernel matches nothing") and error.count("\n") == 1
    with pytest.raises(SystemExit):
        main(["bench", "--help"])
    text = capsys.readouterr().out
    assert all(word in text for word in ("kernels", "schemes", "FILE.yaml"))
