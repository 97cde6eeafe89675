"""What a person should see is seen, once, however a script sets logging up, or does not."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from compression_plugins.engine.notice import announce, warn


@contextmanager
def bare() -> Iterator[None]:
    """Inside, logging is as a new process has it: the test runner's own handlers stand aside."""
    root, own = logging.getLogger(), logging.getLogger("compression_plugins")
    before = root.handlers, root.level, own.handlers, own.level
    root.handlers, own.handlers = [], []
    root.setLevel(logging.WARNING)
    try:
        yield
    finally:
        root.handlers, own.handlers = before[0], before[2]
        root.setLevel(before[1])
        own.setLevel(before[3])


def test_without_any_handler_lines_go_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    with bare():
        announce("a plan")
        warn("a pattern")
    assert capsys.readouterr().err == "compression_plugins: a plan\ncompression_plugins: warning: a pattern\n"


def test_basic_config_at_its_default_level_drops_no_line_and_doubles_none(capsys: pytest.CaptureFixture[str]) -> None:
    with bare():
        logging.basicConfig(level=logging.WARNING, format="LOG %(levelname)s %(message)s")
        announce("a plan")
        warn("a pattern")
    assert capsys.readouterr().err == "compression_plugins: a plan\nLOG WARNING warning: a pattern\n"


def test_basic_config_at_info_gets_every_line(capsys: pytest.CaptureFixture[str]) -> None:
    with bare():
        logging.basicConfig(level=logging.INFO, format="LOG %(message)s")
        announce("a plan")
        warn("a pattern")
    assert capsys.readouterr().err == "LOG a plan\nLOG warning: a pattern\n"


@pytest.mark.parametrize("level", [logging.INFO, logging.WARNING])
def test_a_handler_of_ones_own_gets_what_it_lets_through_and_stderr_the_rest(
    level: int, capsys: pytest.CaptureFixture[str]
) -> None:
    with bare():
        logger, seen = logging.getLogger("compression_plugins"), []

        class Own(logging.Handler):
            def emit(self, record: logging.LogRecord) -> None:
                seen.append(record.getMessage())

        logger.handlers = [Own(level)]
        logger.setLevel(logging.DEBUG)
        announce("a plan")
        warn("a pattern")
    printed = capsys.readouterr().err
    assert seen == (["a plan"] if level == logging.INFO else []) + ["warning: a pattern"]
    assert printed == ("" if level == logging.INFO else "compression_plugins: a plan\n")
