"""What may have become of the files of a saved state, for the jobs of every host."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import torch

from compression_plugins.engine.saved import seal, write

#: Kind of damage -> what every rank must be told.
TOLD = {
    "truncated": "it is damaged, or nothing of torch.save",
    "absent": "none of rank 1 of 2",
    "no key": "tensors is missing",
    "flipped": "checksum does not fit its contents",
    "nan": "holds NaN or infinity",
    "step": "of step",
    "version": "of version 2 is unknown",
}


def damage(kind: str, source: Path, target: Path, stem: str) -> None:
    """Copy the files of a save of two ranks to `target`, and damage those of rank 1."""
    shutil.copytree(source, target)
    path = target / f"{stem}_rank_00001_of_00002.pt"
    if kind == "absent":
        path.unlink()
        return
    if kind == "truncated":
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        return
    document = torch.load(path, weights_only=True)
    state = document.get("state", document)
    pieces = next(iter(state["vectors"]["residual"].values()))
    change: dict[str, Callable[[], object]] = {
        "no key": lambda: state.pop("tensors"),
        "flipped": lambda: next(iter(pieces.values())).view(torch.int32)[:100].bitwise_xor_(1),
        "nan": lambda: next(iter(pieces.values())).fill_(torch.nan),
        "step": lambda: state.update(step=state["step"] + 1),
        "version": lambda: state.update(version=2),
    }
    change[kind]()
    if kind in ("nan", "step"):  # whoever wrote it believed in it
        state["checksum"] = seal(state)["checksum"]
    write(document, path)
