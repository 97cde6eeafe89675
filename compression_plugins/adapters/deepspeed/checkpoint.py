"""The compression state beside DeepSpeed's checkpoint: one file for each rank, in the folder of the tag.

Why not inside DeepSpeed's files: at stage 0 it keeps rank 0's optimizer state only, and a residual differs on every
rank. The conversion to a universal checkpoint leaves our files where they are; they are found there again where the
converted folder is called as DeepSpeed's documentation calls it, by the tag and `_universal`.
"""

from __future__ import annotations

import functools
import itertools
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch.distributed.distributed_c10d import _get_default_store

from ..._version import __version__
from ...engine.notice import announce
from ...engine.saved import Folder, Judged, on_cpu
from ...errors import CompressionError
from ..shared.store_handshake import handshake

if TYPE_CHECKING:
    from .session import DeepSpeedSession

_STEM = "communication_compression"
_HOST = "DeepSpeed"
_SILENT = "it did not come to save or load its checkpoint"
_meetings = itertools.count()  # every rank saves and loads in one order


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
    """Write this rank's file, and remove those of other numbers of ranks, which an earlier save left under this tag.

    Raises:
        CompressionError: some rank cannot write its file; on every rank.
    """
    document = {
        "version": __version__,
        "global_steps": int(session.engine.global_steps),
        "state": on_cpu(session.state_dict()),
    }
    problem = ""
    try:
        Folder(folder, _STEM).write(document, session.rank, session.size, sweep=_first_of_node(session.rank))
    except CompressionError as error:
        problem = str(error)
    _agree(session, {"compression state": problem or "written"}, "Make room, or save elsewhere")
    if problem:
        raise CompressionError(problem)


def sweep(save_dir: str, tag: str) -> None:
    """An engine without compression has saved under `tag`: files that an earlier one left there are older."""
    from deepspeed.comm import comm

    folder = Folder(Path(save_dir) / str(tag), _STEM)
    if _first_of_node(comm.get_rank() if comm.is_initialized() else 0) and folder.remove():
        announce(f"{_HOST}: {folder.path} held the compression state of an earlier checkpoint, which is removed")


def load(session: DeepSpeedSession, folder: Path) -> None:
    """Continue from the files in `folder`: all ranks do, or all begin with empty memory and say so, or all stop.

    The same number of ranks continues bit for bit. Another number starts from the mean of all old residuals on every
    rank, so that what is still owed to the averaged update is paid. A checkpoint of an uncompressed job, or of another
    scheme, starts with empty memory, and so does one whose files are of another step than DeepSpeed's.

    Raises:
        CompressionError: files of some ranks are missing, unreadable, damaged, of another version, or of other steps.
    """
    if Folder(folder, _STEM).empty() and folder.name.endswith("_universal"):
        folder = folder.with_name(folder.name.removesuffix("_universal"))
    documents: list[dict[str, Any]] = []

    def read() -> Any:
        documents.extend(Folder(folder, _STEM).read(session.rank, session.size))
        return [document.get("state") for document in documents] or {}

    judged = session.common.judge(read, session.rank, session.size)
    steps = {document.get("global_steps") for document in documents}
    if judged.state and steps != {session.engine.global_steps}:
        judged = Judged({}, f"of global step {' and '.join(map(str, steps))}, the checkpoint is of another")
    remedy = (
        f"If {_STEM} files of some ranks in {folder} are damaged or of another save, delete all of them: memory then "
        "starts at zero"
    )
    _agree(session, {"compression state": judged.standing}, remedy)
    if judged.bad:
        raise CompressionError(f"{_HOST} compression: {folder}: {judged.standing}. {remedy}")
    if not judged.state:
        session.reset()
        why = "holds no compression state" if judged.standing == "none" else f"holds one {judged.standing}"
        _say(session, f"{folder} {why}; residuals start at zero")
        return
    if len(documents) > 1:
        _say(session, f"the residuals of {len(documents)} ranks are averaged onto {session.size}")
    session.load_state_dict(dict(judged.state))


def _agree(session: DeepSpeedSession, facts: dict[str, Any], remedy: str) -> None:
    name = f"{session.common.name}/checkpoint/{next(_meetings)}"
    handshake(_get_default_store(), _HOST, name, session.rank, session.size, facts, _SILENT, remedy=remedy)


def _first_of_node(rank: int) -> bool:
    """Each node may have a disk of its own."""
    return rank == 0 or os.environ.get("LOCAL_RANK") == "0"


def _say(session: DeepSpeedSession, message: str) -> None:
    if session.rank == 0:
        announce(message)
