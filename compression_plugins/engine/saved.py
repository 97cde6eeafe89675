"""Compression state at rest: sealed by a checksum, judged before it is loaded, in files that are whole or not there."""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import CompressionError, shown
from .notice import announce
from .state import reshard

STATE_VERSION = 3
_DAMAGED = "it is damaged, or nothing of torch.save"


class Judged(NamedTuple):
    """What a rank has found that it could load.

    Attributes:
        state: as of `own`; `{}` where it found none, or a bad one.
        standing: step and configuration, or what is wrong, in words: what all ranks must have in common.
        bad: nothing can be loaded, and the job cannot go on.
    """

    state: Mapping[str, Any]
    standing: str
    bad: bool = False


def seal(state: Mapping[str, Any]) -> dict[str, Any]:
    """`state` with the checksum of its contents."""
    return {**state, "checksum": checksum(state)}


def checksum(state: Mapping[str, Any]) -> str:
    """SHA-256 (hex) over `state` without its `checksum`: names, numbers, dtypes, shapes and every byte of tensors."""
    found = hashlib.sha256()
    _feed(found, {key: value for key, value in state.items() if key != "checksum"})
    return found.hexdigest()


def check(state: Any, lengths: Mapping[str, int]) -> None:
    """Raise `CompressionError`, one sentence, unless `state` is what a session has sealed and can be loaded.

    Args:
        lengths: elements of each parameter.
    """
    if not isinstance(state, Mapping):
        raise CompressionError(f"a compression state is a mapping, not {shown(state)}")
    if state.get("version") != STATE_VERSION:
        raise CompressionError(
            f"compression state of version {shown(state.get('version'))} is unknown; this package reads "
            f"{STATE_VERSION}. Start without it: the residuals begin at zero"
        )
    missing = [key for key in ("step", "rank", "size", "config", "vectors", "tensors", "hooks") if key not in state]
    if missing:
        raise CompressionError(f"this compression state is not whole: {', '.join(missing)} is missing")
    if state.get("checksum") != checksum(state):
        raise CompressionError("this compression state is damaged: its checksum does not fit its contents")
    for slot, named in state["vectors"].items():
        for name, pieces in named.items():
            for start, piece in pieces.items():
                if not piece.isfinite().all():
                    raise CompressionError(f"{slot} of {shown(name)} in this compression state holds NaN or infinity")
                stop, length = int(start) + piece.numel(), lengths.get(name, 0)
                if name in lengths and stop > length:
                    raise CompressionError(
                        f"{shown(name)} has {length} elements here, and {slot} in this compression state {stop}: it is "
                        "of another model"
                    )
    for slot, named in state["tensors"].items():
        for name, tensor in named.items():
            if tensor.is_floating_point() and not tensor.isfinite().all():
                raise CompressionError(f"{slot} of {shown(name)} in this compression state holds NaN or infinity")


def own(states: Any, rank: int, size: int, lengths: Mapping[str, int]) -> Mapping[str, Any]:
    """The checked state for `rank` of `size`: from its own, or from a list of all ranks' of a world of any size, or of
    its own alone; `{}` stays so. From another number of ranks each gets the mean of their memories.

    Raises:
        CompressionError: one sentence.
    """
    if isinstance(states, Mapping):
        if not states:
            return {}
        check(states, lengths)
        if (states["rank"], states["size"]) != (rank, size):
            raise CompressionError(
                f"this compression state is of rank {states['rank']} of {states['size']}, here is rank {rank} of {size}"
                "; give a list of all ranks' states instead"
            )
        return states
    if not isinstance(states, Sequence) or isinstance(states, str | bytes):
        raise CompressionError(f"a compression state is a mapping, or a list of all ranks', not {shown(states)}")
    for state in states:
        check(state, lengths)
    if len(states) == 1 and (states[0]["rank"], states[0]["size"]) == (rank, size):
        return states[0]
    places = [(state["rank"], state["size"], state["step"]) for state in states]
    if places != [(i, len(states), places[0][2]) for i in range(len(states))]:
        raise CompressionError(
            "these compression states are not those of all ranks at one step; rank, size and step: "
            + ", ".join(map(str, places[:8]))
        )
    if len(states) == size:
        return states[rank]
    return seal({**reshard(states), "rank": rank, "size": size})


def judge(read: Callable[[], Any], rank: int, size: int, lengths: Mapping[str, int]) -> Judged:
    """`own` of what `read` returns; errors of either become the standing."""
    try:
        state = own(read(), rank, size, lengths)
    except CompressionError as error:
        return Judged({}, str(error), bad=True)
    if not state:
        return Judged({}, "none")
    config = hashlib.sha256(json.dumps(state["config"], sort_keys=True).encode()).hexdigest()[:8]
    return Judged(state, f"of step {state['step']}, saved with configuration {config}")


# ---------------------------------------------------------------- files


class Folder:
    """The files of all ranks in one folder, `<stem>_rank_00000_of_00002.pt`.

    A file appears under its name only when all of it is on the disk. Those of another number of ranks are older, and
    are removed by the next save.

    Args:
        path: need not exist.
        stem: beginning of the files' names.
    """

    def __init__(self, path: str | os.PathLike[str], stem: str = "compression") -> None:
        self.path, self.stem = Path(path), stem

    def write(self, document: Mapping[str, Any], rank: int, size: int, sweep: bool) -> None:
        """Write the file of `rank`; `sweep` also removes those of other numbers of ranks: on one rank for each disk.

        Raises:
            CompressionError: why it cannot be written; the old file is as it was.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CompressionError(f"cannot make the folder {self.path}: {error.strerror}") from None
        write(document, self._file(rank, size))
        if sweep:
            self.remove(but=size)

    def empty(self) -> bool:
        """Whether it holds no file of any rank."""
        return not self._files()

    def remove(self, but: int = 0) -> int:
        """Remove the files of all numbers of ranks except `but`; how many these were."""
        stale = [path for (_, size), path in self._files().items() if size != but]
        for path in stale:
            path.unlink(missing_ok=True)
        return len(stale)

    def read(self, rank: int, size: int) -> list[dict[str, Any]]:
        """The document of `rank`; or where there is none, and those of another number of ranks are whole, all of them.
        [] where there are no files.

        Raises:
            CompressionError: files are missing or unreadable.
        """
        files = self._files()
        if (rank, size) in files:
            return [read(files[rank, size])]
        sizes = sorted({of for _, of in files})
        if not sizes:
            return []
        if len(sizes) > 1 or size in sizes:
            listed = " and ".join(map(str, sizes))
            raise CompressionError(
                f"{self.path} holds compression state of {listed} ranks, but none of rank {rank} of {size}; "
                "delete those that are too old"
            )
        missing = [str(other) for other in range(sizes[0]) if (other, sizes[0]) not in files]
        if missing:
            raise CompressionError(
                f"{self.path} holds compression state of {sizes[0]} ranks, but not of ranks {', '.join(missing)}; to "
                f"continue on {size} ranks copy all files into a folder that every node can read"
            )
        return [read(files[other, sizes[0]]) for other in range(sizes[0])]

    def _file(self, rank: int, size: int) -> Path:
        return self.path / f"{self.stem}_rank_{rank:05d}_of_{size:05d}.pt"

    def _files(self) -> dict[tuple[int, int], Path]:
        pattern = re.compile(rf"{re.escape(self.stem)}_rank_(\d{{1,9}})_of_(\d{{1,9}})\.pt")
        matches = [(pattern.fullmatch(path.name), path) for path in self.path.glob(f"{self.stem}_rank_*.pt")]
        return {(int(match[1]), int(match[2])): path for match, path in matches if match}


def reader(folder: str | os.PathLike[str], host: str, rank: int, size: int) -> Callable[[], Any]:
    """What reads, for `judge`, the state of `rank` that a `Folder` holds; where it holds none, rank 0 says so."""
    files = Folder(folder)
    if rank == 0 and files.empty():
        announce(f"{host}: {folder} holds no compression state; residuals start at zero")
    return lambda: files.read(rank, size) or {}


def write(document: Mapping[str, Any], path: Path) -> None:
    """`torch.save` to `path`, which names the old file or the whole new one at any moment, after a power failure too.

    Raises:
        CompressionError: why it cannot be written; nothing is left of the attempt.
    """
    partial = path.with_name(f"{path.name}.partial")
    try:
        with open(partial, "wb") as file:
            torch.save(dict(document), file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except (OSError, RuntimeError) as error:  # torch's writer makes a RuntimeError of a full disk
        partial.unlink(missing_ok=True)
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, OSError):
            cause = cause.__context__
        reason = cause.strerror if isinstance(cause, OSError) else str(error).partition("\n")[0]
        raise CompressionError(f"cannot write {path}: {reason}; what stood there before is as it was") from None


def read(path: Path) -> dict[str, Any]:
    """What `write` wrote; tensors on the CPU, nothing but plain values is unpickled.

    Raises:
        CompressionError: it is unreadable.
    """
    try:
        with open(path, "rb") as file:
            content = file.read()
    except OSError as error:
        raise CompressionError(f"cannot read compression state {path}: {error.strerror}") from None
    try:
        document = unpacked(content)
    except CompressionError:
        raise CompressionError(f"cannot read compression state {path}: {_DAMAGED}") from None
    if not isinstance(document, dict):
        raise CompressionError(f"{path} is not a compression state of this package")
    return document


def packed(state: Mapping[str, Any]) -> bytes:
    """`state` as `torch.save` writes it."""
    file = io.BytesIO()
    torch.save(dict(state), file)
    return file.getvalue()


def unpacked(content: bytes) -> Any:
    """What `packed` has packed. Raises `CompressionError` for other bytes."""
    try:
        return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception:  # torch raises several kinds
        raise CompressionError(f"cannot read this compression state: {_DAMAGED}") from None


def on_cpu(value: Any) -> Any:
    """`value` with all tensors on the CPU."""
    if isinstance(value, Mapping):
        return {key: on_cpu(item) for key, item in value.items()}
    if isinstance(value, list):
        return [on_cpu(item) for item in value]
    return value.cpu() if isinstance(value, Tensor) else value


def _feed(found: Any, value: Any) -> None:
    if isinstance(value, Mapping):
        found.update(b"{%d" % len(value))
        for key in sorted(value, key=str):
            found.update(f"{key!s}:".encode())
            _feed(found, value[key])
    elif isinstance(value, list | tuple):
        found.update(b"[%d" % len(value))
        for item in value:
            _feed(found, item)
    elif isinstance(value, Tensor):
        found.update(f"{value.dtype}{list(value.shape)}".encode())
        found.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    else:
        found.update(f"{type(value).__name__} {value!r};".encode())
