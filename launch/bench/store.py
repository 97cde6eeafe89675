"""results.jsonl: rows are only ever appended, and whatever interrupts a run, the file is whole at the next start."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Any

from compression_plugins.errors import ConfigError

Row = dict[str, Any]


def read(path: Path) -> list[Row]:
    """The rows of a file. A last line without its end, which a run is writing or has left, is not a row.

    Raises:
        ConfigError: the file cannot be read, or another line is not a JSON object.
    """
    try:
        lines = path.read_bytes().split(b"\n")[:-1]
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from None
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if not isinstance(row, dict):
            raise ConfigError(f"{path}, line {number}: not a JSON object; delete the line to go on without it")
        rows.append(row)
    return rows


def latest(rows: Iterable[Row]) -> dict[str, Row]:
    """The last row of every key: a cell that failed and was done later counts as done."""
    return {row["key"]: row for row in rows if "key" in row}


class Store:
    """The results of one experiment, open for appending; one process at a time.

    Args:
        path: results.jsonl; made if missing.

    Raises:
        ConfigError: another process has it open, or a line other than the last is not a row.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> Store:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(self.path, "ab")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._file.close()
            raise ConfigError(f"{self.path} is in use by another run; wait for it or choose another --out") from None
        try:
            self.dropped = self._repair()
            self.rows = latest(read(self.path))
        except ConfigError:
            self._file.close()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._file.close()

    def finished(self, key: str) -> bool:
        """Whether the cell was measured; one that failed was not."""
        return key in self.rows and "error" not in self.rows[key]

    def append(self, row: Row) -> None:
        """Add one row, on disk when this returns."""
        self._file.write(json.dumps(row).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())
        self.rows |= latest([row])

    def _repair(self) -> bool:
        """Cut off a half-written last line; True if there was one."""
        text = self.path.read_bytes()
        whole = text.rfind(b"\n") + 1
        if whole == len(text):
            return False
        self._file.truncate(whole)
        return True
