"""Every figure of the report is what the ranks recorded, worked out by hand here."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from launch.document import Machine
from launch.report import HEADERS, Report
from launch.results import Point, Result, read_records, read_run


def record(folder: Path, rank: int, sent: list[int], interface: str = "eth0", ranks: int = 2, end: bool = True) -> None:
    """A run of four steps of 0.1, 0.2, 0.3 and 10 s, evaluated after steps 2 and 4."""
    lines: list[dict[str, object]] = [{"kind": "start", "rank": rank, "ranks": ranks, "interface": interface}]
    for step, (seconds, size) in enumerate(zip([0.1, 0.2, 0.3, 10.0], sent, strict=True), 1):
        lines.append({"kind": "step", "step": step, "seconds": seconds, "sent_bytes": size})
        if step % 2 == 0:
            train_s = 0.3 if step == 2 else 10.6
            lines.append({"kind": "compute", "seconds": 0.05})
            lines.append({"kind": "evaluation", "step": step, "train_s": train_s, "accuracy": 0.2 * step, "loss": 1.0})
    if end:
        lines.append({"kind": "end", "train_s": 10.6})
    folder.mkdir(exist_ok=True)
    (folder / f"rank{rank}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def result(scheme: str, seconds: list[float], accuracy: list[float], sent: float, host: str = "horovod") -> Result:
    points = [Point(i, s, i * sent, a) for i, (s, a) in enumerate(zip(seconds, accuracy, strict=True), 1)]
    return Result(host, scheme, len(points), accuracy[-1], 0.1, 0.04, sent, sent, points)


def report() -> Report:
    dense = result("none", [10, 20, 30, 40], [0.5, 0.91, 0.92, 0.93], 20e6)
    fast = result("scalecom", [2, 4, 6, 8], [0.5, 0.90, 0.89, 0.91], 0.25e6)
    lost = result("signsgd", [2, 4, 6, 8], [0.1, 0.1, 0.2, 0.3], 1e6)
    other = result("scalecom", [3, 6], [0.9, 0.9], 1e6, host="deepspeed")
    return Report([dense, fast, lost, other], "a <machine>, 2026-01-01", "2 hosts", target=0.9, job="job")


def test_figures_of_a_run_are_the_medians_and_means_of_its_records(tmp_path: Path) -> None:
    record(tmp_path, 0, [100, 100, 100, 500])
    record(tmp_path, 1, [300, 300, 300, 700])
    run = read_run(tmp_path, "horovod", "none")
    assert run.step_s == pytest.approx(0.25)
    assert run.exposed_s == pytest.approx(0.20)
    assert run.sent_bytes == 300
    assert run.typical_bytes == 200
    assert run.accuracy == pytest.approx(0.8)
    assert [(p.step, p.seconds, p.sent_bytes) for p in run.points] == [(2, 0.3, 400), (4, 10.6, 1200)]
    assert Result.from_dict(json.loads(json.dumps(run.to_dict()))) == run


def test_the_shared_counter_of_loopback_is_divided_by_the_ranks(tmp_path: Path) -> None:
    for rank in range(2):
        record(tmp_path, rank, [400, 400, 400, 400], interface="lo")
    assert read_run(tmp_path, "horovod", "none").sent_bytes == 200


def test_a_run_that_did_not_end_or_lacks_a_rank_is_refused(tmp_path: Path) -> None:
    record(tmp_path, 0, [1, 1, 1, 1])
    with pytest.raises(ValueError, match="does not hold a finished run"):
        read_run(tmp_path, "horovod", "none")
    record(tmp_path, 1, [1, 1, 1, 1], end=False)
    with pytest.raises(ValueError, match="does not hold a finished run"):
        read_run(tmp_path, "horovod", "none")


def test_a_line_being_written_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "rank0.jsonl").write_text('{"kind": "start"}\n{"kind": "st')
    assert read_records(tmp_path / "rank0.jsonl") == [{"kind": "start"}]


def test_target_is_reached_only_by_two_evaluations_in_a_row() -> None:
    run = result("x", [1, 2, 3, 4], [0.95, 0.5, 0.9, 0.91], 1)
    assert run.reached(0.9) == 3
    assert run.reached(0.91) is None


def test_rows_compare_with_none_of_the_same_host_framework() -> None:
    rows = {(row[0], row[1]): row[2:] for row in report().rows()}
    assert rows["horovod", "none"] == ["93.0", "20.0", "1.0×", "100", "60", "20", "1.0×"]
    assert rows["horovod", "signsgd"][1:3] == ["–", "–"]
    assert rows["horovod", "scalecom"] == ["91.0", "–", "–", "100", "60", "0.25", "80.0×"]
    assert rows["deepspeed", "scalecom"] == ["90.0", "3.0", "–", "100", "60", "1", "–"]


def test_text_and_markdown_hold_every_column_and_cell() -> None:
    one = report()
    assert len(one.headers()) == len(HEADERS) and "time to 90 % (s)" in one.headers()
    for rendering in (one.table().text(), one.markdown()):
        for cell in [*one.headers(), *(cell for row in one.rows() for cell in row)]:
            assert cell in rendering
    assert "a <machine>, 2026-01-01" in one.markdown()


class Page(HTMLParser):
    """Collects tags, attributes and text."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.cells: list[str] = []
        self.links: list[str] = []
        self._in_cell = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self._in_cell = tag in ("td", "th")
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href")]

    def handle_data(self, data: str) -> None:
        if self._in_cell:
            self.cells.append(data)

    def handle_endtag(self, tag: str) -> None:
        self._in_cell = False


def test_page_is_self_contained_without_script_and_escapes_its_text() -> None:
    one, page = report(), Page()
    text = one.page()
    page.feed(text)
    assert "script" not in page.tags and "svg" in page.tags
    assert all(link.startswith("#") for link in page.links)
    assert not re.search(r"url\((?!#)", text)
    assert page.cells == [*one.headers(), *(cell for row in one.rows() for cell in row)]
    assert "a &lt;machine&gt;, 2026-01-01" in text


def test_write_makes_a_picture_a_page_and_a_table(tmp_path: Path) -> None:
    report().write(tmp_path)
    assert (tmp_path / "demo.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["demo.html", "demo.md", "demo.png"]


def test_machine_names_processor_versions_and_date() -> None:
    text = str(Machine.here())
    assert "torch" in text and re.search(r"\d{4}-\d\d-\d\d \d\d:\d\d UTC", text) and "cores" in text


def test_publish_replaces_what_stands_between_the_marks_only(tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- demo:begin -->\nold\n<!-- demo:end -->\nafter\n")
    for _ in range(2):
        report().publish(tmp_path)
    text = readme.read_text()
    assert text.startswith("before\n<!-- demo:begin -->\n| host |") and text.endswith("<!-- demo:end -->\nafter\n")
    assert "old" not in text and text.count("| horovod | none |") == 1
    assert "| horovod | none |" in (tmp_path / "docs/demo.md").read_text()
