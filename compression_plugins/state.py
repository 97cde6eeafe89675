"""What outlives a step, kept by parameter name: residual memories and the tensors that schemes keep."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .errors import CompressionError
from .plan import Bucket
from .schemes.base import Segment


class State:
    """Residuals and named tensors of one rank.

    A bucket's residual is one flat tensor; the pieces of each parameter are views of it. When another bucket covers the
    same elements, in whatever order, they move: so memory follows (parameter, offset), never a bucket's place.
    """

    def __init__(self, undoable: bool = False) -> None:
        self.tensors: dict[tuple[str, str], Tensor] = {}
        self._pieces: dict[str, dict[int, Tensor]] = {}
        self._flats: dict[tuple[Segment, ...], Tensor] = {}
        self._undoable = undoable
        self._pieces_before: dict[str, dict[int, Tensor]] = {}
        self._tensors_before: dict[tuple[str, str], Tensor] = {}

    def residual(self, bucket: Bucket) -> Tensor:
        """fp32 [bucket.numel], to be updated in place."""
        if self._undoable:
            for name in {segment.name for segment in bucket.segments} - self._pieces_before.keys():
                self._pieces_before[name] = {at: p.clone() for at, p in self._pieces.get(name, {}).items()}
        flat = self._flats.get(bucket.segments)
        if flat is None:
            flat = torch.zeros(bucket.numel, device=bucket.device)
            for segment, home in zip(bucket.segments, flat.split([s.numel for s in bucket.segments])):
                self._move(segment, home)
            self._flats[bucket.segments] = flat
        return flat

    def tensor(self, slot: str, name: str, make: Callable[[], Tensor]) -> Tensor:
        """The tensor called `slot` of parameter `name`, to be updated in place; `make()` gives its first value."""
        if (slot, name) not in self.tensors:
            self.tensors[slot, name] = make()
        if self._undoable and (slot, name) not in self._tensors_before:
            self._tensors_before[slot, name] = self.tensors[slot, name].clone()
        return self.tensors[slot, name]

    def commit(self) -> None:
        """Keep what the step did."""
        self._pieces_before.clear()
        self._tensors_before.clear()

    def rollback(self) -> None:
        """Bring back what was there before the step."""
        if not self._undoable:
            raise CompressionError("the reducer was built without undo=True and cannot take back a skipped step")
        self._pieces.update(self._pieces_before)
        self.tensors.update(self._tensors_before)
        self._flats.clear()  # flats that the step made or moved are void; pieces find their places again
        self.commit()

    def norm(self) -> float:
        """Euclidean norm of all residuals."""
        squares = [piece.double().square().sum().cpu() for piece in self._all_pieces()]
        return float(torch.stack(squares).sum().sqrt()) if squares else 0.0

    def nbytes(self) -> int:
        """Bytes held."""
        return sum(tensor.numel() * tensor.element_size() for tensor in (*self._all_pieces(), *self.tensors.values()))

    def state_dict(self) -> dict[str, Any]:
        residuals = {name: {start: p.clone() for start, p in pieces.items()} for name, pieces in self._pieces.items()}
        tensors: dict[str, dict[str, Tensor]] = {}
        for (slot, name), tensor in self.tensors.items():
            tensors.setdefault(slot, {})[name] = tensor.clone()
        return {"residuals": residuals, "tensors": tensors}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        self._flats.clear()
        self._pieces = {
            name: {int(s): p.clone() for s, p in parts.items()} for name, parts in saved["residuals"].items()
        }
        self.tensors = {
            (slot, name): t.clone() for slot, named in saved["tensors"].items() for name, t in named.items()
        }

    def _all_pieces(self) -> list[Tensor]:
        return [piece for pieces in self._pieces.values() for piece in pieces.values()]

    def _move(self, segment: Segment, home: Tensor) -> None:
        """Let `home` be the place of `segment`, taking over what other places hold of it."""
        pieces = self._pieces.setdefault(segment.name, {})
        stop = segment.start + segment.numel
        for start, piece in list(pieces.items()):
            low, high = max(start, segment.start), min(start + piece.numel(), stop)
            if low >= high:
                continue
            home[low - segment.start : high - segment.start] = piece[low - start : high - start].to(home.device)
            del pieces[start]
            if start < low:
                pieces[start] = piece[: low - start]
            if high < start + piece.numel():
                pieces[high] = piece[high - start :]
            self._flats = {k: f for k, f in self._flats.items() if not any(s.name == segment.name for s in k)}
        pieces[segment.start] = home


def reshard(saved: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One state for every rank of a new world, from the states of all ranks of the old one.

    Each rank gets the mean of the old residuals: what is still owed to the averaged update stays the same whatever the
    number of ranks. (Handing out equal parts of their *sum* would scale it by the change of that number.)
    """
    if not saved:
        raise CompressionError("no state to reshard")
    residuals: dict[str, dict[int, Tensor]] = {}
    for name in saved[0]["residuals"]:
        whole = [_assemble(state["residuals"].get(name, {})) for state in saved]
        longest = max(len(w) for w in whole)
        mean = sum(torch.nn.functional.pad(w, (0, longest - len(w))).double() for w in whole) / len(saved)
        residuals[name] = {0: mean.float()}  # type: ignore[union-attr]
    return {**saved[0], "residuals": residuals}


def _assemble(pieces: Mapping[int, Tensor]) -> Tensor:
    length = max((int(start) + piece.numel() for start, piece in pieces.items()), default=0)
    whole = torch.zeros(length)
    for start, piece in pieces.items():
        whole[int(start) : int(start) + piece.numel()] = piece.cpu()
    return whole
