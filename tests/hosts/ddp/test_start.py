"""How a job comes to be compressed, or is told why it is not."""

from __future__ import annotations

import json

import pytest

from compression_plugins.adapters.ddp import launch
from compression_plugins.cli import main as cli
from compression_plugins.errors import CompressionError

from .job import STOCK, result, torchrun

SETTINGS = ["--compression", "scalecom", "--compression-set", "ratio=10", "--compression-set", "min_numel=0"]
VARIABLE = {"COMPRESSION_PLUGINS_CONFIG": '{"scheme": "scalecom", "ratio": 10, "min_numel": 0}'}
IMPATIENT = {"COMPRESSION_PLUGINS_HANDSHAKE_TIMEOUT": "4"}


def test_torchrun_with_our_options_and_its_own(tmp_path):
    flags = [*SETTINGS, "--nnodes=1", "--max-restarts", "0", "--role", "worker", "--log-dir", str(tmp_path), "-t", "3"]
    output = torchrun("start.py", "ways", "--compression", "mine", flags=flags)
    found = json.loads(next(line.split(":", 1)[1] for line in output.splitlines() if '"subclass"' in line))
    assert found == {
        "configured": True,
        "subclass": 3,
        "own hook": -1,
        "compiled inside": 3,
        "one rank": 0,
        "beside Horovod": 3,  # this launcher says whom the configuration is for
        "arguments": ["--compression", "mine"],  # what stands behind the script belongs to the script
    }
    assert "[worker0]" in output and list(tmp_path.rglob("stdout.log"))
    assert "scalecom(ratio=10" in output and "DDP: scalecom, 3 steps on 2 ranks" in output
    assert "communication hook of its own, 'fp16_compress_hook', which stays" in output
    assert "DDP: one rank, nothing is communicated or compressed" in output


def test_the_environment_variable_under_the_stock_launcher():
    output = torchrun("start.py", "ways", launcher=STOCK, environment=VARIABLE)
    found = result(output)
    assert found["subclass"] == 3 and found["own hook"] == -1
    assert found["beside Horovod"] == -1
    assert "this job compresses in Horovod; DDP models travel as they are" in output


def test_a_rank_with_other_settings_stops_the_job_by_name():
    output = torchrun("start.py", "other settings", launcher=STOCK, environment=VARIABLE, status=None)
    assert (
        "MismatchError: DDP compression: rank 1 differs from rank 0 in config.ratio (10 on rank 0, 11 there)" in output
    )


def test_a_rank_without_the_plug_in_stops_the_job_by_name():
    output = torchrun("start.py", "without", launcher=STOCK, environment={**VARIABLE, **IMPATIENT}, status=None)
    assert "MismatchError: DDP compression: rank 1 did not answer within 4 s" in output


def test_the_launcher_refuses_mistakes_in_one_line(capsys, monkeypatch):
    for arguments, text in (
        (["--compression", "scalecon", "train.py"], "did you mean 'scalecom'?"),
        (["--compression-set", "ratio=3", "train.py"], "--compression-set needs a scheme"),
        (["--compression", "topk", "--compression-set", "ration=3", "train.py"], "did you mean 'ratio'?"),
    ):
        assert cli(["torchrun", *arguments]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("compression-plugins torchrun: error: ") and text in line
    monkeypatch.setenv("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")
    with pytest.raises(CompressionError, match="keeps workers from noticing"):
        launch.variables("topk", [])


def test_without_our_options_it_is_torchrun():
    assert launch.variables(None, []) == {}
