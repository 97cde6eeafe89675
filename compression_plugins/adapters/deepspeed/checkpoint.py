"""The compression state beside DeepSpeed's checkpoint: one file for each rank, in the folder of the tag.

Why not inside DeepSpeed's files: at stage 0 it keeps rank 0's optimizer state only, and a residual differs on every
rank; the conversion tools for universal checkpoints would not know our entries.
"""

from __future__ import annotations

import functools
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..._version import __version__
from ...engine.notice import announce
from ...engine.reducer import STATE_VERSION
from ...engine.state import reshard
from ...errors import CompressionError
from ..shared.differences import differences

if TYPE_CHECKING:
    from .session import DeepSpeedSession

_FILE = "communication_compression_rank_{rank:05d}_of_{size:05d}.pt"
_PATTERN = re.compile(r"communication_compression_rank_(\d+)_of_(\d+)\.pt")


def follow(session: DeepSpeedSession) -> None:
    """Save and load with the engine. DeepSpeed writes `latest` later, so it never points at half a state."""
    engine = session.engine
    save_original, load_original = engine._save_checkpoint, engine._load_checkpoint
    whole_original = engine.load_checkpoint

    @functools.wraps(save_original)
    def _save_checkpoint(save_dir: str, tag: str, *args: Any, **kwargs: Any) -> Any:
        with session.exact():
            result = save_original(save_dir, tag, *args, **kwargs)
            save(session, Path(save_dir) / str(tag))
        return result

    @functools.wraps(load_original)
    def _load_checkpoint(load_dir: str, tag: str, *args: Any, **kwargs: Any) -> Any:
        session.common.after_backward()
        result = load_original(load_dir, tag, *args, **kwargs)
        if result[0] is not None:
            if kwargs.get("load_optimizer_states", True) and not kwargs.get("load_module_only", False):
                load(session, Path(load_dir) / str(tag))
            else:
                session.reset()
        return result

    @functools.wraps(whole_original)
    def load_checkpoint(*args: Any, **kwargs: Any) -> Any:
        result = whole_original(*args, **kwargs)
        if result[0] is not None and session.weights is not None:
            session.weights.resume()  # only now are the master weights loaded
        return result

    engine._save_checkpoint, engine._load_checkpoint = _save_checkpoint, _load_checkpoint
    engine.load_checkpoint = load_checkpoint


def save(session: DeepSpeedSession, folder: Path) -> None:
    """Write this rank's file; it appears under its name only when complete."""
    document = {
        "version": __version__,
        "config": session.common.config.to_dict(),
        "state": _to_cpu(session.state_dict()),
    }
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / _FILE.format(rank=session.rank, size=session.size)
    partial = path.with_suffix(".partial")
    torch.save(document, partial)
    os.replace(partial, path)


def load(session: DeepSpeedSession, folder: Path) -> None:
    """Continue from the files in `folder`.

    The same number of ranks continues bit for bit. Another number starts from the mean of all old residuals on every
    rank, so that what is still owed to the averaged update is paid. A checkpoint of an uncompressed job, or of another
    scheme, starts with empty memory, and says so.

    Raises:
        CompressionError: files of some ranks are missing, unreadable, or of another version.
    """
    matches = [(_PATTERN.fullmatch(path.name), path) for path in folder.glob("communication_compression_rank_*.pt")]
    files = {(int(match[1]), int(match[2])): path for match, path in matches if match}
    own = files.get((session.rank, session.size))
    if not files:
        session.reset()
        _say(session, f"{folder} holds no compression state; residuals start at zero")
        return
    document = _read(own) if own else _merge(session, files, folder)
    changed = differences(document["config"], session.common.config.to_dict())
    if changed:
        text = "; ".join(changed).replace(" on rank 0", " then").replace(" there", " now")
        _say(session, f"the configuration has changed since {folder} was saved: {text}")
    if document["config"]["scheme"] != session.common.config.scheme.name:
        session.reset()
        _say(session, "another scheme cannot use these residuals; they start at zero")
        return
    session.load_state_dict(document["state"])


def _merge(session: DeepSpeedSession, files: dict[tuple[int, int], Path], folder: Path) -> dict[str, Any]:
    """The document for a rank of a world of another size."""
    sizes = sorted({size for _, size in files})
    if len(sizes) > 1:
        raise CompressionError(
            f"{folder} holds compression state of {sizes} ranks, not of {session.size}; delete old files"
        )
    missing = [rank for rank in range(sizes[0]) if (rank, sizes[0]) not in files]
    if missing:
        raise CompressionError(
            f"{folder} holds compression state of {sizes[0]} ranks, but not of ranks {missing}; to continue on "
            f"{session.size} ranks copy all files into a folder that every node can read"
        )
    documents = [_read(files[rank, sizes[0]]) for rank in range(sizes[0])]
    _say(session, f"the residuals of {sizes[0]} ranks are averaged onto {session.size}")
    return {**documents[0], "state": reshard([document["state"] for document in documents])}


def _say(session: DeepSpeedSession, message: str) -> None:
    if session.rank == 0:
        announce(message)


def _read(path: Path) -> dict[str, Any]:
    try:
        document = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises several kinds for a damaged file
        raise CompressionError(f"cannot read compression state {path}: {error}") from error
    if not isinstance(document, dict) or "config" not in document:
        raise CompressionError(f"{path} is not a compression state of this package")
    state = document.get("state") or document.get("reducer") or {}
    version = state.get("version")
    if version != STATE_VERSION:
        raise CompressionError(
            f"{path} holds compression state of version {version}, this package reads {STATE_VERSION}: delete the "
            "communication_compression files of that checkpoint to start from empty memory"
        )
    return document


def _to_cpu(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _to_cpu(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_to_cpu(item) for item in value]
    return value.cpu() if isinstance(value, torch.Tensor) else value
