"""The demonstration really runs, and what it prints is what its ranks measured."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launch import demo
from launch.report import Report
from launch.results import Result, read_run

from .isolation import counts_bytes

pytestmark = counts_bytes

COLUMNS = ["accuracy %", "speed-up", "ms a step", "exposed comm. (ms)", "MB sent a step", "ratio"]
PARAMETERS = 784 * 256 + 256 * 256 + 10 * 256 + 2 * 256 + 10  # of the quick network
DENSE = 4 * PARAMETERS  # bytes that each of two ranks sends to average fp32 gradients


@pytest.mark.nightly
@pytest.mark.hosts
def test_quick_demo_reports_what_its_two_jobs_measured(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "launch.demo", "--quick", "--out", str(tmp_path)],
        cwd=demo.ROOT,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert all(column in done.stdout for column in COLUMNS)
    saved = json.loads((tmp_path / "results.json").read_text())
    dense, compressed = (Result.from_dict(result) for result in saved["results"])
    assert (dense.scheme, compressed.scheme) == ("none", "scalecom")
    assert dense.steps == compressed.steps == demo.QUICK.steps

    for result in (dense, compressed):
        assert result == read_run(tmp_path / "runs" / f"horovod-{result.scheme}-0", "horovod", result.scheme)
        assert 0 < result.compute_s < 5 and 0 < result.step_s < 5
    # Both ranks must learn, and the counters must see one dense gradient, and much less than one, in a step.
    assert dense.accuracy > 0.6 and compressed.accuracy > 0.3
    assert DENSE < dense.typical_bytes < 1.3 * DENSE
    assert compressed.typical_bytes < DENSE / 8

    assert saved["network"] in done.stdout
    assert ("loopback" in saved["network"]) == ("Loopback" in done.stdout)
    for name in ("demo.html", "demo.md"):
        text = (tmp_path / name).read_text()
        assert saved["machine"] in text and saved["network"] in text
    rows = Report(**{**saved, "results": [dense, compressed]}).rows()
    assert all(cell in done.stdout for row in rows for cell in row)


@pytest.mark.hosts
def test_a_scheme_that_does_not_exist_is_one_error_and_exit_status_1(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert demo.main(["--quick", "--loopback", "--schemes", "scalecmo", "--out", str(tmp_path)]) == 1
    text = " ".join(capfd.readouterr().out.split())
    assert "unknown scheme 'scalecmo'" in text and "scalecom" in text


def test_none_is_the_stock_command_and_a_scheme_is_one_flag(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Lab:
        interface = "eth0"

        def horovod(self, command: list[str], flags: list[str], env: dict[str, str], log: Path) -> list[str]:
            assert not any("COMPRESSION" in name for name in env)
            return [*flags, *command]

    settings = demo.QUICK
    dense = demo.start_horovod(Lab(), "none", settings, tmp_path, 0)  # type: ignore[arg-type]
    flag = demo.start_horovod(Lab(), "topk", settings, tmp_path, 0)  # type: ignore[arg-type]
    assert flag == ["--compression", "topk", *dense]
    assert demo.config_of("scalecom") == str(demo.CONFIGS / "scalecom.yaml")


def test_both_host_frameworks_are_given_the_same_file(tmp_path: Path) -> None:
    class Lab:
        interface = "lo"

        def deepspeed(self, command: list[str], port: int, env: dict[str, str], log: Path) -> list[str]:
            return command

    command = demo.start_deepspeed(Lab(), "scalecom", demo.QUICK, tmp_path, 0)  # type: ignore[arg-type]
    config = json.loads(Path(command[command.index("--deepspeed_config") + 1]).read_text())
    assert config["communication_compression"] == {"file": demo.config_of("scalecom")}
    demo.start_deepspeed(Lab(), "none", demo.QUICK, tmp_path, 0)  # type: ignore[arg-type]
    assert "communication_compression" not in json.loads((tmp_path / "ds_config.json").read_text())


@pytest.mark.hosts
def test_a_terminated_demo_ends_its_ranks(tmp_path: Path) -> None:
    """By the signal that becomes Ctrl-C's, so that both ways are tried."""
    command = [
        sys.executable,
        "-m",
        "launch.demo",
        "--quick",
        "--steps",
        "100000",
        "--loopback",
        "--out",
        str(tmp_path),
    ]
    process = subprocess.Popen(command, cwd=demo.ROOT, stdout=subprocess.PIPE, text=True)
    record = tmp_path / "runs/horovod-none-0/rank1.jsonl"
    limit = time.monotonic() + 120
    while not record.exists() and time.monotonic() < limit:
        time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130 and "interrupted" in output
    size = record.stat().st_size
    time.sleep(2)
    assert record.stat().st_size == size, "a rank still trains"
