"""The report's figures are those that the rows give, worked out by hand here."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from compression_plugins.errors import ConfigError
from launch.bench import report
from launch.bench.analysis import Crossover, Group, Results, Who, crossover, mean_error, phases, speed_ups
from launch.bench.cells import Cell
from launch.bench.readings import read as read_run
from launch.bench.readings import steps_to
from launch.bench.sections import sections

RATES = {"100mbit": 1e8, "1gbit": 1e9, "10gbit": 1e10}
COMPUTE_S, CODEC_S, DENSE, SMALL = 0.030, 0.020, 20e6, 1e6
ABOUT = {
    "experiment": "sweep",
    "machine": {"processor": "a processor", "cores": 2, "memory_gib": 8.0, "system": "a system"},
    "versions": {"torch": "2.13"},
    "commit": "0123456789abcdef",
    "dirty": False,
}


def row(kind: str, scheme: str, rate: str = "-", **figures: Any) -> dict[str, Any]:
    fields = {"kind": kind, "host": "horovod", "scheme": scheme, "model": "mlp", "ranks": 2, "rate": rate, "seed": 0}
    fields |= {"compute_ms": None, "steps": 5, "date": "2026-01-01T00:00:00+00:00", "provenance": ABOUT, **figures}
    key = "-".join(str(fields[name]) for name in ("kind", "host", "scheme", "model", "ranks", "rate", "seed"))
    return {"key": key, **fields}


def step_s(sent: float, codec: float, rate: str) -> float:
    return COMPUTE_S + codec + 8 * sent / RATES[rate]


def timed(scheme: str, sent: float, codec: float, rate: str, **more: Any) -> dict[str, Any]:
    seconds = step_s(sent, codec, rate)
    figures = {"step_s": seconds, "step_quartiles_s": [seconds, seconds], "compute_s": COMPUTE_S, "sent_bytes": sent}
    return row("speed", scheme, rate, **figures, **more)


def sweep() -> list[dict[str, Any]]:
    rows = []
    for rate in RATES:
        rows += [timed("none", DENSE, 0.0, rate), timed("bf16", DENSE / 2, 0.0, rate)]
        rows.append(timed("scalecom", SMALL, CODEC_S, rate))
    return rows


def write(folder: Path, rows: list[dict[str, Any]]) -> Path:
    path = folder / "results.jsonl"
    path.write_text("".join(json.dumps(each) + "\n" for each in rows))
    return path


def markdown(path: Path, name: str) -> str:
    """Text of a section; its picture is made, but not drawn."""
    return next(s.markdown() for s in sections(Results.load([path]), {}) if s.name == name)


def table(path: Path, name: str) -> dict[str, list[str]]:
    """Rows of a section's first table by the scheme in its second column."""
    lines = markdown(path, name).split("\n\n")[1].splitlines()[2:]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {each[1]: each for each in cells}


def test_a_crossover_lies_where_the_interpolation_of_the_logarithms_puts_it(tmp_path: Path) -> None:
    found = Results.load([write(tmp_path, sweep())])
    times = found.times(Group("mlp", 2))
    ratios = speed_ups(times[Who("horovod", "scalecom")], times[Who("horovod", "bf16")])
    above, below = (step_s(DENSE / 2, 0, r) / step_s(SMALL, CODEC_S, r) for r in ("1gbit", "10gbit"))
    assert above > 1 > below
    expected = 10 ** (9 + math.log10(above) / (math.log10(above) - math.log10(below)))
    assert crossover(ratios) == Crossover(pytest.approx(expected), 1e10)

    printed = table(tmp_path / "results.jsonl", "sweep-speed-mlp-2")["scalecom"][-1]
    assert float(printed.removesuffix(" Gb/s")) == pytest.approx(expected / 1e9, rel=0.01)


def test_a_speed_up_that_never_ends_or_never_begins_has_no_crossover() -> None:
    assert str(crossover({"100mbit": 3.0, "1gbit": 1.1})) == "beyond 1 Gb/s"
    assert str(crossover({"100mbit": 0.9, "1gbit": 0.8})) == "nowhere"
    assert crossover({"unlimited": 2.0}) is None
    late = crossover({"100mbit": 0.9, "1gbit": 2.0, "10gbit": 0.5})
    assert late is not None and late.rate == pytest.approx(10**9.5)


def test_time_to_target_is_steps_times_the_step_and_needs_every_seed(tmp_path: Path) -> None:
    rows = sweep()
    for seed, at in enumerate((20, 30, 25)):
        points = [[step, 95.0 if step >= at else 50.0] for step in range(5, 60, 5)]
        rows.append(row("accuracy", "none", "unlimited", seed=seed, target=90.0, points=points, metric=95.0))
        short = points if seed else points[:2]
        rows.append(row("accuracy", "scalecom", "unlimited", seed=seed, target=90.0, points=short, metric=95.0))
    cells = table(write(tmp_path, rows), "sweep-target-mlp-2")
    dense = step_s(DENSE, 0, "1gbit")
    assert cells["none"][3] == "25 (20–30)"
    assert cells["none"][5] == f"{25 * dense:.3g} ({20 * dense:.3g}–{30 * dense:.3g})"
    assert cells["scalecom"][3] == "2 of 3 runs"


def test_a_target_is_reached_by_two_evaluations_in_a_row() -> None:
    rising = [[5, 80.0], [10, 91.0], [15, 89.0], [20, 90.0], [25, 92.0]]
    assert steps_to(rising, 90.0, 1) == 20
    assert steps_to([[step, -value] for step, value in rising], -90.0, -1) == 20
    assert steps_to(rising[:4], 90.0, 1) is None


def test_phases_of_a_step_add_up_to_it(tmp_path: Path) -> None:
    parts = {"encode_s": 0.005, "decode_s": 0.004, "exposed_s": 0.006, "wire_s": 0.010}
    rows = [timed("scalecom", SMALL, CODEC_S, "1gbit", **parts), timed("none", DENSE, 0.0, "1gbit")]
    found = phases(Results.load([write(tmp_path, rows)]), Group("mlp", 2))["1gbit"]
    ours, stock = found[Who("horovod", "scalecom")], found[Who("horovod", "none")]
    assert ours.pop("hidden") == pytest.approx(0.004)
    assert sum(ours.values()) == pytest.approx(step_s(SMALL, CODEC_S, "1gbit"))
    assert stock == pytest.approx({"compute": COMPUTE_S, "exposed": 8 * DENSE / 1e9})


def test_prediction_error_is_the_mean_over_measured_cells(tmp_path: Path) -> None:
    wrong = {"none": 1.2 * step_s(DENSE, 0, "1gbit"), "scalecom": 0.9 * step_s(SMALL, CODEC_S, "1gbit"), "topk": 1.0}
    advice = {"predictions": wrong, "eligible": ["none", "scalecom"], "recommended": "scalecom"}
    path = write(tmp_path, [*sweep(), row("prediction", "*", "1gbit", **advice)])
    pairs = Results.load([path]).errors()
    assert len(pairs) == 2 and mean_error(pairs) == pytest.approx(0.15)
    text = markdown(path, "sweep-prediction")
    assert "| all |  |  | 2 | 15.0 % |" in text and "horovod: none (+20 %)" in text


def test_each_part_is_there_once_its_rows_are(tmp_path: Path) -> None:
    quality = {"numel": 9, "target_ratio": 2.0, "ratio": 2.0, "vnmse": 0.1, "cosine": 0.9, "bias": 0.1}
    only = row("quality", "bf16", **quality, state_bytes_per_value=0.0)
    found = sections(Results.load([write(tmp_path, [only])]), {})
    assert [section.name for section in found] == ["sweep-quality-mlp-2"]
    one = sections(Results.load([write(tmp_path, [timed("none", DENSE, 0.0, "1gbit")])]), {})
    assert [section.name for section in one] == ["sweep-speed-mlp-2", "sweep-phases-mlp-2"]
    more = [timed(scheme, size, 0.0, "1gbit") | {"ranks": n, "key": f"{scheme}{n}"} for scheme, size in (("none", 1.0),)
            for n in (2, 4)]  # fmt: skip
    assert "sweep-volume-mlp" in [s.name for s in sections(Results.load([write(tmp_path, more)]), {})]


def test_the_page_is_self_contained_and_names_machine_commit_and_failures(tmp_path: Path) -> None:
    failed = row("speed", "marsit", "1gbit", error="first\nRuntimeError: out of <memory>")
    page = report.write([write(tmp_path, [*sweep(), failed])], tmp_path).read_text()
    assert page.count("<svg") == 2 and "<script" not in page and not re.search(r"(src|href)=\"http", page)
    for text in ("a processor, 2 cores", "0123456789", "RuntimeError: out of &lt;memory&gt;", "9 speed; 1 failed"):
        assert text in page


def test_the_last_row_of_a_cell_counts(tmp_path: Path) -> None:
    failed = {**sweep()[0], "error": "RuntimeError: once"}
    found = Results.load([write(tmp_path, [failed, *sweep()])])
    assert len(found.rows) == 9 and not found.failures


def test_merged_results_carry_the_name_of_the_newest_experiment(tmp_path: Path) -> None:
    newer = {"date": "2026-01-02T00:00:00+00:00", "provenance": {**ABOUT, "experiment": "later"}}
    rows = [timed("marsit", SMALL, CODEC_S, "1gbit", **newer), *sweep()]
    names = [section.name for section in sections(Results.load([write(tmp_path, rows)]), {})]
    assert names and all(name.startswith("later-") for name in names)


def test_parts_are_published_between_the_marks_of_their_page(tmp_path: Path) -> None:
    (tmp_path / "sweep-speed-mlp-2.md").write_text("| scalecom |\n")
    (tmp_path / "sweep-speed-mlp-2.png").write_bytes(b"")
    pages = tmp_path / "docs"
    pages.mkdir()
    page = pages / "page.md"
    page.write_text("before\n<!-- sweep-speed-mlp-2:begin -->\nold\n<!-- sweep-speed-mlp-2:end -->\nafter\n")
    assert report.publish(["sweep-speed-mlp-2", "sweep-phases-mlp-2"], tmp_path, pages) == ["sweep-speed-mlp-2"]
    text = page.read_text()
    assert "scalecom" in text and "old" not in text and text.startswith("before") and text.endswith("after\n")
    with pytest.raises(ConfigError, match="no page in .* has marks for sweep-phases-mlp-2"):
        report.publish(["sweep-phases-mlp-2"], tmp_path, pages)


@pytest.mark.parametrize("text", ["mlpp=3", "mlp", "mlp=high"])
def test_a_bad_target_is_one_error(text: str) -> None:
    with pytest.raises(ConfigError, match=f"--target {text}: "):
        report.parse_targets([text])


def test_results_without_a_measured_row_are_one_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no measured row in"):
        report.write([write(tmp_path, [])], tmp_path)
    with pytest.raises(ConfigError, match="cannot read"):
        report.write([tmp_path / "absent.jsonl"], tmp_path)


def test_a_run_is_read_without_its_warm_up(tmp_path: Path) -> None:
    cell = Cell("speed", "horovod", "bf16", "mlp", 2, "1gbit", 0, steps=3, warmup_steps=1)
    for rank, sizes in enumerate(([900, 10, 20, 60], [700, 30, 40, 80])):
        records: list[dict[str, Any]] = [{"kind": "start", "rank": rank, "ranks": 2, "interface": "eth0"}]
        for step, (size, seconds) in enumerate(zip(sizes, (9.0, 0.1, 0.2, 0.6)), 1):
            records.append({"kind": "step", "step": step, "seconds": seconds + rank, "sent_bytes": size})
        records += [{"kind": "compute", "seconds": 0.05}, {"kind": "end"}]
        (tmp_path / f"rank{rank}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (tmp_path / "about.json").write_text('{"numel": 5, "batch": 1}')
    telemetry = {"sent_bytes": 8, "ratio": None, "state_bytes": 0, "encode_s": 0.01, "decode_s": 0, "exposed_s": 0}
    lines = [{**telemetry, "wire_s": seconds} for seconds in (9.0, 0.1, 0.3, 0.5)]
    (tmp_path / "telemetry.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = read_run(tmp_path, cell)
    assert found["step_s"] == 0.2 and found["sent_bytes"] == pytest.approx((20 + 30 + 70) / 3)
    assert found["typical_bytes"] == 30 and found["compute_s"] == 0.05
    assert found["wire_s"] == 0.3 and found["payload_bytes"] == 8 and "ratio" not in found
    local = replace(cell, config={"every": 3})
    assert read_run(tmp_path, local)["step_s"] == pytest.approx(0.3), "the mean step of a whole round"
    with pytest.raises(ValueError, match="3 steps hold no whole round of 4"):
        read_run(tmp_path, replace(cell, scheme="ddp/post_local_sgd"))
    (tmp_path / "rank1.jsonl").unlink()
    with pytest.raises(ValueError, match="does not hold a finished run of 2 ranks"):
        read_run(tmp_path, cell)


#: Pages that tell a part of a sweep, because the rest was not measured yet.
BY_HAND = {"transformer"}


def test_the_marks_of_the_benchmark_pages_belong_to_committed_sweeps_and_are_paired() -> None:
    sweeps = {path.stem.replace("_", "-") for path in Path(report.__file__).parent.glob("*.yaml")}
    for page in report.DOCS.glob("*.md"):
        text = page.read_text(encoding="utf-8")
        marks = re.findall(r"<!-- ([a-z0-9-]+):(begin|end) -->", text)
        names = [name for name, _ in marks[::2]]
        assert marks == [(name, end) for name in names for end in ("begin", "end")]
        if page.stem in BY_HAND:
            assert not names, "it is measured now: let it be like the others"
            assert f"compression-plugins bench launch/bench/{page.stem}.yaml" in " ".join(text.split())
        elif page.stem in sweeps:
            named = {sweep for sweep in sweeps for name in names if name.startswith(f"{sweep}-")}
            assert page.stem in named and all(name.startswith(tuple(f"{sweep}-" for sweep in sweeps)) for name in names)
