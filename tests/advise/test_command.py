"""The command: what it prints last, what it writes, what it refuses."""

from __future__ import annotations

import argparse
import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from compression_plugins.advise.choose import Row, choose
from compression_plugins.advise.command import add_arguments, run
from compression_plugins.advise.predict import Step
from compression_plugins.config import Config
from compression_plugins.errors import CompressionError, ConfigError

ROOT = Path(__file__).resolve().parents[2]
LAST = re.compile(r"^recommend: (\S+) \(.+\)$")
NET = """
import torch

def example():
    return torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.ReLU(), torch.nn.Linear(128, 10)), torch.randn(8, 64)
"""


@pytest.fixture(autouse=True)
def _small_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    """Codecs are timed on little: these tests are about what is said."""
    monkeypatch.setattr("compression_plugins.advise.work._LARGE", 1 << 16)


def advise(*arguments: str) -> int:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return run(parser.parse_args(arguments))


def recommended(capsys: pytest.CaptureFixture[str]) -> str:
    last = capsys.readouterr().out.splitlines()[-1]
    match = LAST.match(last)
    assert match, last
    return match[1]


def test_a_slow_network_gets_a_compressor_and_the_yaml_that_selects_it(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("--ranks", "4", "--bandwidth", "10mbit", "--shapes", "mlp", "--compute-ms", "10")
    assert advise(*arguments, "--schemes", "scalecom", "fake") == 0
    lines = capsys.readouterr().out.splitlines()
    match = LAST.match(lines[-1])
    assert match and match[1] == "scalecom" and "faster than none" in lines[-1]
    document = yaml.safe_load("\n".join(lines[lines.index("# the configuration") : -1]))
    assert Config.load(document) == Config.load("scalecom")


@pytest.mark.parametrize("scheme", ["scalecom", "powersgd"])
def test_what_misses_the_loss_of_dense_training_under_adam_is_not_recommended_there(
    scheme: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("--ranks", "4", "--bandwidth", "10mbit", "--shapes", "mlp", "--compute-ms", "10", "--schemes", scheme)
    assert advise(*arguments, "--optimizer", "adam") == 0
    assert recommended(capsys) == "bf16"
    assert advise(*arguments, "--optimizer", "sgd") == 0
    assert recommended(capsys) == scheme


def test_local_steps_are_predicted_as_the_mean_step_of_a_round(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = []
    for every in (1, 10):
        paths.append(tmp_path / f"every{every}.yaml")
        paths[-1].write_text(f"scheme: ef_signsgd\nevery: {every}\n")
    rows = tmp_path / "rows.jsonl"
    arguments = ("--ranks", "4", "--bandwidth", "10mbit", "--shapes", "mlp", "--compute-ms", "10", "--json", str(rows))
    assert advise(*arguments, "--schemes", "none", "--config", str(paths[0]), "--config", str(paths[1])) == 0
    often, seldom = [json.loads(line) for line in rows.read_text().splitlines()[-2:]]
    assert seldom["sent_bytes"] == pytest.approx(often["sent_bytes"] / 10)
    assert seldom["exposed_s"] == pytest.approx(often["exposed_s"] / 10, rel=0.5)
    assert recommended(capsys) == str(paths[1])


def test_a_fast_network_is_left_alone(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("--ranks", "4", "--bandwidth", "10Tb", "--latency", "0us", "--shapes", "mlp", "--compute-ms", "1000")
    assert advise(*arguments, "--schemes", "scalecom", "fake") == 0
    assert recommended(capsys) == "none"


def test_json_has_a_line_for_each_scheme_with_all_that_it_was_made_of(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, own = tmp_path / "rows.jsonl", tmp_path / "own.yaml"
    own.write_text("scheme: scalecom\nratio: 20\n")
    arguments = ("--ranks", "4", "--bandwidth", "1Gb", "--shapes", "mlp", "--compute-ms", "10", "--json", str(path))
    assert advise(*arguments, "--schemes", "fake", "--config", str(own), "--framework", "deepspeed") == 0
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["label"] for row in rows] == ["none", "bf16", "fake", str(own)]
    assert sum(row["recommended"] for row in rows) == 1
    assert {row["kind"] for row in rows} == {"prediction"} and {row["host"] for row in rows} == {"deepspeed"}
    assert rows[3]["config"]["ratio"] == 20 and rows[3]["network"]["bandwidth"] == 1e9
    for row in rows:
        assert row["step_s"] == pytest.approx(row["compute_s"] + row["exposed_s"]) and row["compute_s"] == 0.01
    assert rows[0]["sent_bytes"] == pytest.approx(1.5 * 4 * 5_824_522)
    assert not next(row for row in rows if row["label"] == "fake")["recommended"]


def test_a_model_is_timed_where_it_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "advise_net.py").write_text(NET)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    arguments = ("--ranks", "2", "--bandwidth", "100mbit", "--model", "advise_net:example", "--schemes", "fake")
    assert advise(*arguments, "--device", "cpu") == 0
    out = capsys.readouterr().out
    assert "advise_net:example, 4 tensors" in out and LAST.match(out.splitlines()[-1])


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        ("--shapes mlp", "--ranks 64 --bandwidth"),
        ("--shapes mlp --ranks 4", "--bandwidth"),
        ("--shapes mlp --bandwidth 1Gb", "--ranks"),
        ("--shapes mlp --ranks 1 --bandwidth 1Gb", "2 or more"),
        ("--shapes mlp --ranks 4 --bandwidth 1GB", "bits a second"),
        ("--shapes mlp --ranks 4 --bandwidth 1Gb --latency 20", "20us"),
        ("--shapes mlp --ranks 6 --bandwidth 1Gb --ranks-per-node 4", "divide"),
        ("--shapes gpt3 --ranks 4 --bandwidth 1Gb", "gpt2"),
        ("--shapes mlp --ranks 4 --bandwidth 1Gb --schemes scalcom", "scalecom"),
        ("--shapes mlp --ranks 4 --bandwidth 1Gb --config /nowhere.yaml", "cannot read"),
        ("--shapes mlp --ranks 4 --bandwidth 1Gb --compute-ms 3 --tflops 2", "one of them"),
        ("--shapes mlp --ranks 4 --bandwidth 1Gb --compute-ms 0", "above 0"),
        ("--model no:example --ranks 4 --bandwidth 1Gb", "MODULE:FUNCTION"),
        ("--model no:example --ranks 4 --bandwidth 1Gb --batch 3", "timed"),
        ("--shapes mlp --ranks 4 --bandwidth 1Gb --device tpu", "cpu or cuda"),
    ],
)
def test_a_mistake_is_one_sentence_with_its_remedy(arguments: str, hint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HOROVOD_RANK", "RANK"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(CompressionError) as error:
        advise(*arguments.split())
    assert hint in str(error.value) and "\n" not in str(error.value)


def row(label: str, step_s: float, error: float = 0.1, scheme: str = "scalecom") -> Row:
    config = Config.load(label if label in ("none", "bf16", "fake") else scheme)
    return Row(label, config, Step(step_s, step_s, 1.0, 0.0, 0.0, step_s - 1, 1.0), error)


@pytest.mark.parametrize(
    ("none", "bf16", "compressor", "expected"),
    [
        (2.0, 1.5, 1.2, "x"),
        (2.0, 1.5, 1.45, "bf16"),  # not worth its loss of accuracy
        (1.02, 1.0, 0.99, "none"),
        (2.0, 3.0, 1.97, "none"),
        (2.0, 3.0, 1.5, "x"),
    ],
)
def test_what_costs_accuracy_has_to_win_by_the_margin(
    none: float, bf16: float, compressor: float, expected: str
) -> None:
    choice = choose([row("none", none, 0), row("bf16", bf16, 0), row("x", compressor), row("fake", 0.1)], 0.05)
    assert choice.row.label == expected
    match = LAST.match(choice.line())
    assert match and match[1] == expected


def test_of_equally_fast_compressors_the_most_exact_is_chosen() -> None:
    rows = [row("none", 9.0), row("bf16", 8.0), row("x", 1.00, 0.5), row("y", 1.04, 0.1), row("z", 2.0, 0.01)]
    assert choose(rows, 0.05).row.label == "y"


def test_what_needs_a_learning_rate_of_its_own_is_never_recommended() -> None:
    rows = [row("none", 9.0), row("bf16", 8.0), row("x", 1.0, error=40.0)]
    assert choose(rows, 0.05).row.label == "bf16"


def test_without_bf16_there_is_no_comparison() -> None:
    with pytest.raises(KeyError):
        choose([row("none", 9.0)])


def test_memory_bandwidth_is_checked() -> None:
    with pytest.raises(ConfigError, match="memory bandwidth"):
        advise(*"--shapes mlp --ranks 4 --bandwidth 1Gb --memory-bandwidth 2Gb".split())


@pytest.mark.nightly
@pytest.mark.hosts
def test_ranks_of_a_job_measure_their_network_and_one_of_them_speaks(tmp_path: Path) -> None:
    """As torchrun starts them."""
    (tmp_path / "advise_net.py").write_text(NET)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    code = (
        "import argparse\nfrom compression_plugins.advise.command import *\n"
        "parser = argparse.ArgumentParser(); add_arguments(parser); run(parser.parse_args())"
    )
    command = [sys.executable, "-c", code, "--model", "advise_net:example", "--schemes", "fake", "--json", "rows.jsonl"]
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen(
            command,
            cwd=tmp_path,
            env={**os.environ, **common, "RANK": str(i), "LOCAL_RANK": str(i), "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(2)
    ]
    results = [rank.communicate(timeout=120) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], results
    assert "2 ranks, measured" in results[0][0] and "all-reduce" in results[0][0]
    assert LAST.match(results[0][0].splitlines()[-1])
    assert results[1][0] == ""
    [first, *_] = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert first["host"] == "deepspeed" and first["network"]["lines"]["all_reduce"]["points"]
