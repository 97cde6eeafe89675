"""What telemetry says, and what is made of it for a person."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from compression_plugins.cli import main
from compression_plugins.engine.plan import TensorSpec, make_plan
from compression_plugins.engine.reducer import Reducer
from compression_plugins.engine.telemetry import Telemetry
from compression_plugins.engine.watch import View, follow
from compression_plugins.errors import ConfigError
from compression_plugins.transports.echo import EchoTransport
from compression_plugins.transports.local import LocalWorld, drive

from ..world import config


def run(path: Path, steps: int = 3, dtype: str = "float32", **keys: object) -> list[dict]:
    cfg = config("topk", **keys)
    (bucket,) = make_plan(cfg, [TensorSpec("w", (40, 50), dtype)]).buckets
    reducers = [Reducer(cfg, t, Telemetry(str(path)) if not t.rank else None) for t in LocalWorld(2).transports]
    for step in range(steps):
        works = []
        for rank, reducer in enumerate(reducers):
            g = torch.randn(bucket.numel, generator=torch.Generator().manual_seed(10 * step + rank))
            works.append(reducer.start(bucket, g))
        drive(works)
        if step == 1:
            dense = sum(torch.randn(2000, generator=torch.Generator().manual_seed(10 + rank)) for rank in (0, 1))
            result = works[0].result()
            run.cosine = float(torch.nn.functional.cosine_similarity(result, dense, dim=0))  # type: ignore[attr-defined]
        for reducer in reducers:
            reducer.end_step()
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize(("dtype", "width"), [("float32", 4), ("bfloat16", 2)])
def test_the_ratio_is_to_what_the_host_would_have_sent_in_its_own_dtype(tmp_path: Path, dtype: str, width: int) -> None:
    for line in run(tmp_path / "run.jsonl", dtype=dtype):
        assert line["ratio"] == pytest.approx(2000 * width / line["sent_bytes"], rel=1e-3)
        assert line["cosine"] is None


def test_the_cosine_is_that_of_the_dense_average_and_is_sampled(tmp_path: Path) -> None:
    lines = run(tmp_path / "a.jsonl", cosine_every=2)
    plain = run(tmp_path / "b.jsonl")
    assert [line["cosine"] is None for line in lines] == [False, True, False]
    again = run(tmp_path / "c.jsonl", cosine_every=1)
    assert again[1]["cosine"] == pytest.approx(run.cosine, abs=2e-5) and 0.3 < run.cosine < 1  # type: ignore[attr-defined]
    assert plain[1]["sent_bytes"] == lines[1]["sent_bytes"] < lines[0]["sent_bytes"], "the dense average travels too"
    assert plain[2]["residual_norm"] == lines[2]["residual_norm"], "and changes nothing"


def test_phases_are_ranges_of_the_profiler() -> None:
    cfg = config("topk")
    (bucket,) = make_plan(cfg, [TensorSpec("w", (40, 50), "float32")]).buckets
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        Reducer(cfg, EchoTransport(0, 2)).reduce(bucket, torch.ones(bucket.numel))
    names = {event.name for event in profile.events()}
    assert {"compression.encode", "compression.decode", "compression.wait"} <= names


def test_watch_prints_what_is_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "run.jsonl"
    lines = run(path, steps=5, cosine_every=2)
    capsys.readouterr()
    assert main(["watch", str(path), "--once"]) == 0
    said = {
        line.split("  ")[-2 if "  " in line.strip() else 0].strip(): line
        for line in capsys.readouterr().out.splitlines()
    }
    text = "\n".join(said.values())
    assert "step  5" in text and f"{lines[0]['ratio']:.0f}" in text.replace(".", " ").split() or "x fewer" in text
    assert f"{lines[-1]['cosine']:.3f} of sent and dense gradient" in text


def test_watch_takes_lines_as_they_come_and_averages_ratios_by_bytes(tmp_path: Path) -> None:
    view, path = View(), tmp_path / "run.jsonl"
    assert dict(view.table()) == {"step": "none yet"}
    line = {
        "step": 1,
        "sent_bytes": 1_000_000,
        "ratio": 10.0,
        "residual_norm": 2.0,
        "exposed_s": 0.004,
        "skipped": False,
    }
    path.write_text(json.dumps(line) + "\n" + json.dumps({**line, "step": 2})[:20])  # the second is being written
    lines = follow(path)
    view.take(next(lines))
    assert dict(view.table())["sent"] == "1.000 MB per step, 0.001 GB in all"
    with open(path, "a") as file:
        rest = {**line, "step": 2, "ratio": 2.5, "residual_norm": None, "skipped": True}
        file.write(json.dumps({**line, "step": 2})[20:] + "\n" + json.dumps({**rest, "step": 3}) + "\n")
    view.take(next(lines))
    table = dict(view.table())
    assert table["step"] == "3" and table["residual norm"] == "2" and table["skipped steps"] == "1"
    assert table["exposed"] == "4.00 ms per step"
    assert math.isclose(float(table["ratio"].split("x")[0]), 3 / (0.1 + 0.1 + 0.4), rel_tol=0.01)


def test_watch_refuses_what_is_no_telemetry(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "other.json"
    assert main(["watch", str(path)]) == 2 and "COMPRESSION_PLUGINS_TELEMETRY=" in capsys.readouterr().err
    for text in ("[1]\n", "hello\n", '{"step": 1}\n', '{"step": "x", "sent_bytes": 1}\n'):
        path.write_text(text)
        with pytest.raises(ConfigError, match="is no file of telemetry"):
            list(follow(path, once=True))


def test_explain_prints_every_tensor_with_its_rule_without_a_job(capsys: pytest.CaptureFixture[str]) -> None:
    model = ["--model", "tests.engine.test_telemetry:example"]
    rules = ["--set", "rules=[{match: 'head*', scheme: qsgd}]", "--set", "exempt=['*embed*']", "--set", "min_numel=0"]
    assert main(["explain", "--config", "topk", *model, "--ranks", "4", *rules]) == 0
    out = capsys.readouterr().out
    rows = {line.split()[0]: line.split() for line in out.splitlines() if line}
    assert out.startswith("topk on 4 ranks, 5 tensors, 1,574 values")
    assert rows["embed.weight"][1:3] == ["20x16", "float32"] and rows["embed.weight"][-2:] == ["exempt", "'*embed*'"]
    assert rows["head.weight"][-3:] == ["qsgd", "rule", "'head*'"] and rows["body.weight"][-2:] == ["topk", "scheme"]
    assert rows["body.bias"][-4:] == ["fewer", "than", "2", "dimensions"]
    total = sum(
        float(row[4].replace(",", "")) for name, row in rows.items() if name in dict(example().named_parameters())
    )
    assert f"{total / 1e6:.3f} MB per step and rank" in out


def test_explain_says_what_crosses_nodes(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["explain", "--config", "qsgd", "--model", "tests.engine.test_telemetry:example", "--ranks", "4"]
    assert main([*words, "--set", "levels=2", "--set", "min_numel=0"]) == 0
    out = capsys.readouterr().out
    rows = {line.split()[0]: line.split() for line in out.splitlines() if line}
    total = sum(
        float(row[4].replace(",", "")) for name, row in rows.items() if name in dict(example().named_parameters())
    )
    assert "levels: 2 nodes of 2 ranks" in out and f"{total / 1e6:.3f} MB per step and rank," in out
    assert main([*words, "--set", "levels=node"]) == 2
    assert "give their number" in capsys.readouterr().err
    assert main([*words, "--set", "levels=3"]) == 2
    assert "4 ranks cannot be divided into nodes of 3" in capsys.readouterr().err


def example() -> torch.nn.Module:
    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.body = torch.nn.Embedding(20, 16), torch.nn.Linear(16, 40)
            self.head = torch.nn.Linear(40, 14)

    return Model()


@pytest.mark.parametrize("name", ["nowhere:model", "tests.engine.test_telemetry", "tests.engine.test_telemetry:nothing",
                                  "tests.engine.test_telemetry:config", "json:JSONDecoder"])  # fmt: skip
def test_explain_says_in_one_line_what_is_wrong_with_a_model(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", "--config", "topk", "--model", name]) == 2
    error = capsys.readouterr().err
    assert error.startswith("compression-plugins explain: --model ") and error.count("\n") == 1
