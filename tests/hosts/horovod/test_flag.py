"""`horovodrun --compression ...` on a script that knows nothing of it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from compression_plugins.adapters.horovod import launch as horovod_launch
from compression_plugins.config import Config
from compression_plugins.errors import CompressionError

OURS = [sys.executable, "-m", "compression_plugins.adapters.horovod.launch"]


@pytest.fixture(scope="module")
def dense(horovodrun: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Any:
    path = tmp_path_factory.mktemp("dense") / "model.pt"
    job = horovodrun(arguments=["--save", str(path)])
    job.model = torch.load(path, weights_only=True)
    return job


def bytes_a_step(output: str) -> tuple[float, float]:
    """(sent, dense) in MB, from the line that rank 0 prints at the end."""
    match = re.search(r"([\d.]+) MB sent per step and rank \(dense ([\d.]+) MB", output)
    assert match, output[-3000:]
    return float(match[1]), float(match[2])


def test_a_job_without_the_flag_is_untouched(dense: Any) -> None:
    assert [r["compressor"] for r in dense.results] == ["NoneCompressor"] * 2
    assert "compression_plugins" not in dense.output


def test_the_stock_command_compresses_an_unmodified_script(horovodrun: Callable[..., Any], dense: Any) -> None:
    job = horovodrun("--compression", "scalecom", arguments=["--compression", "mine"])
    ranks = job.results
    assert [r["compressor"] for r in ranks] == ["SchemeCompressor"] * 2
    assert ranks[0]["weights"] == ranks[1]["weights"] != dense.results[0]["weights"]
    assert [r["own_flag"] for r in ranks] == ["mine"] * 2, "what follows the command belongs to the script"
    sent, uncompressed = bytes_a_step(job.output)
    assert sent < uncompressed / 20
    assert all(r["last"] < r["first"] for r in ranks)


def test_keeping_every_value_trains_as_dense_does(horovodrun: Callable[..., Any], dense: Any, tmp_path: Path) -> None:
    settings = ("--compression-set", "ratio=1", "--compression-set", "min_numel=1")
    horovodrun("--compression", "topk", *settings, arguments=["--save", str(tmp_path / "model.pt")])
    compressed = torch.load(tmp_path / "model.pt", weights_only=True)
    for name, weight in dense.model.items():
        torch.testing.assert_close(compressed[name], weight, rtol=0, atol=1e-6)


@pytest.mark.nightly
def test_scheme_none_leaves_horovods_own_path(horovodrun: Callable[..., Any], dense: Any) -> None:
    job = horovodrun("--compression", "none")
    assert [r["compressor"] for r in job.results] == ["NoneCompressor"] * 2
    assert job.results[0]["weights"] == dense.results[0]["weights"]


def test_a_section_of_the_config_file_and_our_own_launcher(horovodrun: Callable[..., Any], tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    path.write_text("params:\n  cycle_time_ms: 2\ncompression:\n  scheme: qsgd\n  bits: 4\n  exempt: ['4.*']\n")
    malformed = {"HOROVOD_CACHE_CAPACITY": "(None,)"}
    job = horovodrun("--config-file", str(path), "--compression-set", "bits=8", launcher=OURS, **malformed)
    assert "qsgd(bits=8" in job.output and "exempt '4.*'" in job.output
    assert job.results[0]["weights"] == job.results[1]["weights"]
    sent, uncompressed = bytes_a_step(job.output)
    assert 0.2 * uncompressed < sent < 0.35 * uncompressed
    assert "unset HOROVOD_CACHE_CAPACITY='(None,)'" in job.output


def test_the_scripts_own_compression_wins_and_is_named(horovodrun: Callable[..., Any]) -> None:
    job = horovodrun("--compression", "scalecom", arguments=["--fp16"])
    assert [r["compressor"] for r in job.results] == ["FP16Compressor"] * 2
    assert "the script's own compression" in job.output and "'scalecom'" in job.output


@pytest.mark.nightly
def test_one_rank_is_told_that_nothing_is_compressed(horovodrun: Callable[..., Any]) -> None:
    job = horovodrun("--compression", "scalecom", np=1)
    assert "one rank only; nothing is communicated or compressed" in job.output and len(job.results) == 1


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--compression", "scalcom"], "did you mean 'scalecom'"),
        (["--compression", "scalecom", "--compression-set", "ratoi=3"], "did you mean 'ratio'"),
        (["--compression-set", "ratio=3"], "add --compression NAME"),
        (["--compression", "no/such/file.yaml"], "cannot read"),
    ],
)
def test_a_mistake_is_one_sentence_before_anything_starts(flags: list[str], sentence: str) -> None:
    stock = Path(sys.executable).with_name("horovodrun")
    done = subprocess.run([stock, *flags, "-np", "2", "false"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert sentence in done.stderr and len(done.stderr.strip().splitlines()) == 1, done.stderr


def test_help_lists_the_options() -> None:
    stock = Path(sys.executable).with_name("horovodrun")
    done = subprocess.run([stock, "--help"], capture_output=True, text=True, timeout=60)
    assert "--compression NAME|FILE" in done.stdout and "--compression-set KEY=VALUE" in done.stdout


def test_the_launcher_imports_no_torch() -> None:
    program = (
        "import sys; sys.argv = ['horovodrun', '--compression', 'scalecom', '-np', '2', 'true']\n"
        "from compression_plugins.adapters.horovod import launch; launch.install(); launch.install()\n"
        "from horovod.runner import launch; args = launch.parse_args()\n"
        "import os, json; print(json.loads(os.environ['COMPRESSION_PLUGINS_CONFIG'])['scheme'], args.command)\n"
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["scalecom", "['true']"]


@pytest.mark.parametrize(("levels", "groups"), [("node", "1"), ("null", "None")])
def test_jobs_of_two_levels_may_make_groups_of_ranks(levels: str, groups: str) -> None:
    arguments = ["horovodrun", "--compression", "qsgd", "--compression-set", f"levels={levels}", "-np", "2", "true"]
    program = (
        f"import os, sys; sys.argv = {arguments}\n"
        "from compression_plugins.adapters.horovod import launch; launch.install()\n"
        "from horovod.runner import launch; launch.parse_args()\n"
        "print(os.environ.get('HOROVOD_DYNAMIC_PROCESS_SETS'))"
    )
    env = {key: value for key, value in os.environ.items() if key != "HOROVOD_DYNAMIC_PROCESS_SETS"}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, env=env)
    assert done.stdout.split() == [groups], done.stderr


def test_workers_receive_the_whole_configuration(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("scheme: topk\nratio: 50\nrules:\n  - {match: 'a*', scheme: qsgd, bits: 4}\n")
    exported = horovod_launch.configuration(str(path), ["seed=7", "exempt=['*.bias']"], None)
    assert json.loads(json.dumps(exported)) == exported
    expected = Config.load(path, {"seed": 7, "exempt": ["*.bias"]})
    assert Config.load(exported).digest() == expected.digest()


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"compression: 7\n", "must be a scheme's name"),
        (b"compression: {scheme: topk, ratio: -1}\n", "ratio"),
        (b"compression: {scheme: nope}\n", "unknown scheme 'nope'"),
        (b"compression: [\n", "not plain YAML"),
        (b"compression: !!python/object/apply:os.system ['touch /tmp/never']\n", "not plain YAML"),
        (b"compression: caf\xe9\n", "not UTF-8"),
        (None, "cannot read"),
    ],
)
def test_a_bad_section_is_refused(tmp_path: Path, content: bytes | None, sentence: str) -> None:
    path = tmp_path / "job.yaml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(CompressionError, match=re.escape(sentence)):
        horovod_launch.configuration(None, [], str(path))


def test_the_command_line_replaces_the_section(tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    path.write_text("compression: topk\n")
    assert horovod_launch.configuration(None, [], str(path))["scheme"] == "topk"
    assert horovod_launch.configuration("qsgd", ["bits=4"], str(path))["bits"] == 4
    assert horovod_launch.configuration(None, [], None) is None
    path.write_text("params: {cycle_time_ms: 1}\n")
    assert horovod_launch.configuration(None, [], str(path)) is None


@pytest.mark.parametrize("text", ["ratio", "=3", "ratio=[", ""])
def test_an_assignment_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(CompressionError, match="KEY=VALUE|plain YAML"):
        horovod_launch.configuration("topk", [text], None)


def test_a_package_that_workers_would_not_notice_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(horovod_launch.importlib.metadata, "entry_points", lambda group: ())
    monkeypatch.setattr(os, "environ", dict(os.environ))
    with pytest.raises(CompressionError, match="not installed"):
        horovod_launch._check_door()
