"""The command that runs experiments, and the way of a result into its page."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from compression_plugins.errors import CompressionError
from launch.reproduce import EXPERIMENTS, publish, resume

ROOT = Path(__file__).parents[2]


def reproduce(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "launch.reproduce", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)


def test_the_list_describes_every_experiment() -> None:
    done = reproduce("--list")
    assert done.returncode == 0, done.stderr
    names = [line.split()[0] for line in done.stdout.splitlines()]
    assert names == list(EXPERIMENTS)
    assert all(len(line.split()) > 4 for line in done.stdout.splitlines())


def test_an_unknown_name_is_refused_with_the_nearest() -> None:
    done = reproduce("asylpg-bit")
    assert done.returncode == 2 and "did you mean 'asylpg-bits'" in done.stderr and "Traceback" not in done.stderr


def test_a_quick_result_is_not_published() -> None:
    done = reproduce("asylpg-bits", "--quick", "--publish")
    assert done.returncode == 2 and "--publish wants the whole experiment" in done.stderr


@pytest.mark.parametrize(
    ("name", "words", "message"),
    [
        ("asylpg-bits", ["method=dense"], "has no parts"),
        ("parity", ["dense"], "KEY=VALUE"),
        ("parity", ["methods=dense"], "did you mean 'method'"),
        ("parity", ["method=dens"], "did you mean 'dense'"),
    ],
)
def test_a_part_that_there_is_not_is_refused(name: str, words: list[str], message: str, tmp_path: Path) -> None:
    only = [argument for word in words for argument in ("--only", word)]
    done = reproduce(name, "--quick", "--out", str(tmp_path / "out"), *only)
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr


def result(folder: Path, name: str, text: str) -> Path:
    folder.mkdir()
    (folder / f"{name}.md").write_text(text)
    (folder / f"{name}.png").write_bytes(b"a picture")
    return folder


def test_publishing_replaces_what_stands_between_the_marks_and_nothing_else(tmp_path: Path) -> None:
    before, after = "# A method\n\nIdea ±.\n\n", "\n\n<!-- other:begin -->\nkept\n<!-- other:end -->\n"
    page = tmp_path / "method.md"
    page.write_text(f"{before}<!-- some:begin -->\nold\nlines\n<!-- some:end -->{after}", encoding="utf-8")
    (tmp_path / "another.md").write_text("no marks")
    for number, text in enumerate(("| first |\n", "| second ± 1 |\n")):
        out = result(tmp_path / f"out{number}", "some", text)
        assert publish("some", out, tmp_path) == page
        assert page.read_text() == f"{before}<!-- some:begin -->\n{text}<!-- some:end -->{after}"
    assert (tmp_path / "some.png").read_bytes() == b"a picture"
    assert (tmp_path / "another.md").read_text() == "no marks"


def test_an_experiment_with_parts_goes_on_from_what_was_published_and_never_over_records_of_its_own(
    tmp_path: Path,
) -> None:
    (tmp_path / "parity.md").write_text("<!-- parity:begin -->\n<!-- parity:end -->")
    out, fresh = result(tmp_path / "out", "parity", "| table |\n"), result(tmp_path / "fresh", "parity", "")
    (out / "runs.jsonl").write_text('{"a": 1}\n')
    publish("parity", out, tmp_path)
    resume("parity", fresh, tmp_path)
    assert (fresh / "runs.jsonl").read_text() == '{"a": 1}\n'
    (fresh / "runs.jsonl").write_text('{"a": 2}\n')
    resume("parity", fresh, tmp_path)
    assert (fresh / "runs.jsonl").read_text() == '{"a": 2}\n'


BEGIN, END = "<!-- some:begin -->", "<!-- some:end -->"


@pytest.mark.parametrize("text", ["", BEGIN, END, END + BEGIN, 2 * (BEGIN + END), "<!-- o:begin --><!-- o:end -->"])
def test_a_page_without_both_marks_is_one_clear_error_and_stays_as_it_is(text: str, tmp_path: Path) -> None:
    page = tmp_path / "method.md"
    page.write_text(text)
    out = result(tmp_path / "out", "some", "| table |\n")
    with pytest.raises(CompressionError, match="no page in .* has the marks <!-- some:begin --> and <!-- some:end"):
        publish("some", out, tmp_path)
    assert page.read_text() == text and not (tmp_path / "some.png").exists()


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_has_its_place_on_one_page(name: str) -> None:
    text = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "docs").glob("**/*.md"))
    assert [text.count(f"<!-- {name}:{mark} -->") for mark in ("begin", "end")] == [1, 1]
