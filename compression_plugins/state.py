"""What outlives a step, kept by parameter name: residual memories and the tensors that schemes keep."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .errors import CompressionError
from .plan import Bucket
from .schemes.base import Segment

_RESIDUAL = "residual"


class Elements:
    """One fp32 value for each element of each parameter: a residual, a momentum.

    A bucket's values are one flat tensor; the pieces of each parameter are views of it. When another bucket covers the
    same elements, in whatever order, they move: so memory follows (parameter, offset), never a bucket's place.
    """

    def __init__(self, undoable: bool) -> None:
        self.pieces: dict[str, dict[int, Tensor]] = {}
        self._flats: dict[tuple[Segment, ...], Tensor] = {}
        self._undoable = undoable
        self._before: dict[str, dict[int, Tensor]] = {}

    def of(self, bucket: Bucket) -> Tensor:
        """fp32 [bucket.numel], to be updated in place; zeros at first."""
        if self._undoable:
            for name in {segment.name for segment in bucket.segments} - self._before.keys():
                self._before[name] = {at: p.clone() for at, p in self.pieces.get(name, {}).items()}
        flat = self._flats.get(bucket.segments)
        if flat is None:
            flat = torch.zeros(bucket.numel, device=bucket.device)
            for segment, home in zip(bucket.segments, flat.split([s.numel for s in bucket.segments])):
                self._move(segment, home)
            self._flats[bucket.segments] = flat
        return flat

    def commit(self) -> None:
        self._before.clear()

    def rollback(self) -> None:
        self.pieces.update(self._before)
        self._flats.clear()  # flats that the step made or moved are void; pieces find their places again
        self._before.clear()

    def all(self) -> list[Tensor]:
        return [piece for pieces in self.pieces.values() for piece in pieces.values()]

    def state_dict(self) -> dict[str, dict[int, Tensor]]:
        return {name: {start: p.clone() for start, p in pieces.items()} for name, pieces in self.pieces.items()}

    def load_state_dict(self, saved: Mapping[str, Mapping[int, Tensor]]) -> None:
        self._flats.clear()
        self.pieces = {name: {int(s): p.clone() for s, p in parts.items()} for name, parts in saved.items()}

    def _move(self, segment: Segment, home: Tensor) -> None:
        """Let `home` be the place of `segment`, taking over what other places hold of it."""
        pieces = self.pieces.setdefault(segment.name, {})
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


class State:
    """Residuals, other memories of one value an element, and named tensors of one rank."""

    def __init__(self, undoable: bool = False) -> None:
        self.tensors: dict[tuple[str, str], Tensor] = {}
        self._undoable = undoable
        self._elements: dict[str, Elements] = {_RESIDUAL: Elements(undoable)}
        self._tensors_before: dict[tuple[str, str], Tensor] = {}

    def residual(self, bucket: Bucket) -> Tensor:
        """fp32 [bucket.numel], to be updated in place."""
        return self._elements[_RESIDUAL].of(bucket)

    def vector(self, slot: str, bucket: Bucket) -> Tensor:
        """fp32 [bucket.numel] called `slot`, to be updated in place: a memory beside the residual, kept like it."""
        if slot not in self._elements:
            self._elements[slot] = Elements(self._undoable)
        return self._elements[slot].of(bucket)

    def tensor(self, slot: str, name: str, make: Callable[[], Tensor], device: str) -> Tensor:
        """The tensor called `slot` of parameter `name`, to be updated in place; `make()` gives its first value."""
        tensor = self.tensors[slot, name] if (slot, name) in self.tensors else make()
        self.tensors[slot, name] = tensor.to(device)  # a loaded one may come from elsewhere
        if self._undoable and (slot, name) not in self._tensors_before:
            self._tensors_before[slot, name] = self.tensors[slot, name].clone()
        return self.tensors[slot, name]

    def commit(self) -> None:
        """Keep what the step did."""
        for elements in self._elements.values():
            elements.commit()
        self._tensors_before.clear()

    def rollback(self) -> None:
        """Bring back what was there before the step."""
        if not self._undoable:
            raise CompressionError("the reducer was built without undo=True and cannot take back a skipped step")
        for elements in self._elements.values():
            elements.rollback()
        self.tensors.update(self._tensors_before)
        self._tensors_before.clear()

    def norm(self) -> float:
        """Euclidean norm of all residuals."""
        squares = [piece.double().square().sum().cpu() for piece in self._elements[_RESIDUAL].all()]
        return float(torch.stack(squares).sum().sqrt()) if squares else 0.0

    def nbytes(self) -> int:
        """Bytes held."""
        vectors = [piece for elements in self._elements.values() for piece in elements.all()]
        return sum(tensor.numel() * tensor.element_size() for tensor in (*vectors, *self.tensors.values()))

    def state_dict(self) -> dict[str, Any]:
        tensors: dict[str, dict[str, Tensor]] = {}
        for (slot, name), tensor in self.tensors.items():
            tensors.setdefault(slot, {})[name] = tensor.clone()
        vectors = {slot: elements.state_dict() for slot, elements in self._elements.items()}
        return {"residuals": vectors.pop(_RESIDUAL), "vectors": vectors, "tensors": tensors}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        vectors = {_RESIDUAL: saved["residuals"], **saved.get("vectors", {})}  # early states have no others
        self._elements = {slot: Elements(self._undoable) for slot in vectors}
        for slot, elements in self._elements.items():
            elements.load_state_dict(vectors[slot])
        self.tensors = {
            (slot, name): t.clone() for slot, named in saved["tensors"].items() for name, t in named.items()
        }


def reshard(saved: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One state for every rank of a new world, from the states of all ranks of the old one.

    Each rank gets the mean of the old residuals: what is still owed to the averaged update stays the same whatever the
    number of ranks. (Handing out equal parts of their *sum* would scale it by the change of that number.) Other
    memories of one value an element are averaged alike; named tensors are those of the first rank.
    """
    if not saved:
        raise CompressionError("no state to reshard")
    vectors = {
        slot: _mean([state.get("vectors", {}).get(slot, {}) for state in saved]) for slot in saved[0].get("vectors", {})
    }
    return {**saved[0], "residuals": _mean([state["residuals"] for state in saved]), "vectors": vectors}


def _mean(saved: Sequence[Mapping[str, Mapping[int, Tensor]]]) -> dict[str, dict[int, Tensor]]:
    """Mean over ranks of one memory."""
    result = {}
    for name in saved[0]:
        whole = [_assemble(elements.get(name, {})) for elements in saved]
        longest = max(len(w) for w in whole)
        padded = torch.stack([torch.nn.functional.pad(w, (0, longest - len(w))).double() for w in whole])
        result[name] = {0: padded.mean(0).float()}
    return result


def _assemble(pieces: Mapping[int, Tensor]) -> Tensor:
    length = max((int(start) + piece.numel() for start, piece in pieces.items()), default=0)
    whole = torch.zeros(length)
    for start, piece in pieces.items():
        whole[int(start) : int(start) + piece.numel()] = piece.cpu()
    return whole
