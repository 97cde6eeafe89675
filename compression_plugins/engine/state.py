"""What outlives a step, kept by parameter name: residual memories and the tensors that schemes keep."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import triton_kernels as K
from ..core.call import Role, Segment
from ..core.memory import Vector
from ..errors import CompressionError
from .plan import Bucket

_RESIDUAL = "residual"
#: `node` of a state that ranks may load whatever nodes they make: each holds all elements.
EVERY = 0


class Elements:
    """One fp32 value for each element of each parameter: a residual, a momentum.

    A bucket's values are one flat tensor; the pieces of each parameter are views of it. When another bucket covers the
    same elements, in whatever order, they move: so memory follows (parameter, offset), never a bucket's place.
    """

    def __init__(self) -> None:
        self.pieces: dict[str, dict[int, Tensor]] = {}
        self.flats: dict[tuple[Segment, ...], Tensor] = {}

    def of(self, bucket: Bucket) -> Tensor:
        """fp32 [bucket.numel]; zeros at first."""
        flat = self.flats.get(bucket.segments)
        if flat is None:
            flat = torch.zeros(bucket.numel, device=bucket.device)
            for segment, home in zip(bucket.segments, flat.split([s.numel for s in bucket.segments])):
                self._move(segment, home)
            self.flats[bucket.segments] = flat
        return flat

    def trade(self, other: Elements, segments: tuple[Segment, ...]) -> bool:
        """Exchange the places of a bucket with `other`, if both hold it as one flat tensor."""
        if segments not in self.flats or segments not in other.flats:
            return False
        self.flats[segments], other.flats[segments] = other.flats[segments], self.flats[segments]
        for s in segments:
            mine, theirs = self.pieces[s.name], other.pieces[s.name]
            mine[s.start], theirs[s.start] = theirs[s.start], mine[s.start]
        return True

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """A copy of elements [start, stop) of parameter `name`; zeros where nothing is kept."""
        pieces = self.pieces.get(name, {})
        device = next(iter(pieces.values())).device if pieces else "cpu"
        result = torch.zeros(stop - start, device=device)
        for at, piece in pieces.items():
            low, high = max(at, start), min(at + piece.numel(), stop)
            if low < high:
                result[low - start : high - start] = piece[low - at : high - at]
        return result

    def write(self, name: str, start: int, values: Tensor) -> None:
        """Elements of parameter `name` from `start`, wherever they lie; those that lie nowhere get a place."""
        rest = start
        for at, piece in sorted(self.pieces.get(name, {}).items()):
            low, high = max(at, start), min(at + piece.numel(), start + values.numel())
            if low < high:
                if rest < low:
                    self.pieces[name][rest] = values[rest - start : low - start].clone()
                piece[low - at : high - at] = values[low - start : high - start]
                rest = high
        if rest < start + values.numel():
            self.pieces.setdefault(name, {})[rest] = values[rest - start :].clone()

    def narrow(self, segments: Sequence[Segment]) -> None:
        """Keep nothing of the parameters of `segments` but these elements."""
        for segment in segments:
            for start, piece in list(self.pieces.get(segment.name, {}).items()):
                low, high = max(start, segment.start), min(start + piece.numel(), segment.start + segment.numel)
                if (low, high) != (start, start + piece.numel()):
                    del self.pieces[segment.name][start]
                    if low < high:
                        self.pieces[segment.name][low] = piece[low - start : high - start].clone()
                    self.flats = {k: f for k, f in self.flats.items() if not any(s.name == segment.name for s in k)}

    def all(self) -> list[Tensor]:
        """Every piece of every parameter."""
        return [piece for pieces in self.pieces.values() for piece in pieces.values()]

    def state_dict(self, lengths: Mapping[str, int]) -> dict[str, dict[int, Tensor]]:
        """Without what stands behind the end of a parameter whose length is known."""
        return {
            name: {start: p[: max(0, lengths[name] - start)].clone() if name in lengths else p.clone()
                   for start, p in pieces.items()}
            for name, pieces in self.pieces.items()
        }  # fmt: skip

    def load_state_dict(self, saved: Mapping[str, Mapping[int, Tensor]]) -> None:
        self.flats.clear()
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
            self.flats = {k: f for k, f in self.flats.items() if not any(s.name == segment.name for s in k)}
        pieces[segment.start] = home


class Undoable:
    """`Elements` as the last step left them, and as the running step makes them; a commit exchanges the two."""

    def __init__(self) -> None:
        self.kept, self.running = Elements(), Elements()
        self._touched: dict[str, list[tuple[int, int]]] = {}
        self._buckets: dict[tuple[Segment, ...], None] = {}

    def of(self, bucket: Bucket, copy: bool) -> Vector:
        """The vector before and after this reduction; with `copy` the latter begins as the former.

        A bucket that the step has reduced before goes on from there, in place.
        """
        kept, running = self.kept.of(bucket), self.running.of(bucket)
        gaps = [self._gaps(segment) for segment in bucket.segments]
        fresh = all(gap == [(s.start, s.start + s.numel)] for gap, s in zip(gaps, bucket.segments))
        for segment, gap in zip(bucket.segments, gaps):
            if gap:
                self._touched.setdefault(segment.name, []).extend(gap)
        self._buckets[bucket.segments] = None
        if fresh and not copy:
            return Vector(kept, running)
        if fresh:
            running.copy_(kept)
        elif any(gaps):  # the step knows some of these elements from another bucket
            offset = 0
            for segment, gap in zip(bucket.segments, gaps):
                for low, high in gap:
                    part = slice(offset + low - segment.start, offset + high - segment.start)
                    running[part] = kept[part]
                offset += segment.numel
        return Vector(running, running)

    def commit(self) -> None:
        """What the step made is what is kept."""
        left = {name: list(spans) for name, spans in self._touched.items()}
        for segments in self._buckets:
            spans = [(s.name, (s.start, s.start + s.numel)) for s in segments if s.numel]
            whole = all(span in left[name] for name, span in spans)
            if whole and self.kept.trade(self.running, segments):
                for name, span in spans:
                    left[name].remove(span)
        for name, rest in left.items():
            for low, high in rest:
                self.kept.write(name, low, self.running.read(name, low, high))
        self.rollback()

    def rollback(self) -> None:
        """Forget what the running step has made."""
        self._touched.clear()
        self._buckets.clear()

    def load_state_dict(self, saved: Mapping[str, Mapping[int, Tensor]]) -> None:
        self.rollback()
        self.running = Elements()
        self.kept.load_state_dict(saved)

    def _gaps(self, segment: Segment) -> list[tuple[int, int]]:
        """The parts of `segment` that the step has not touched."""
        gaps = [(segment.start, segment.start + segment.numel)] if segment.numel else []
        for start, stop in self._touched.get(segment.name, ()):
            gaps = [
                part
                for low, high in gaps
                for part in ((low, min(high, start)), (max(low, stop), high))
                if part[0] < part[1]
            ]
        return gaps


class State:
    """Residuals, other memories of one value for each element, and named tensors of one rank.

    What a step changes is kept apart until `commit`, so that `rollback` takes it back.
    """

    def __init__(self) -> None:
        self.tensors: dict[tuple[str, str], Tensor] = {}
        self._vectors: dict[str, Undoable] = {}
        self._before: dict[tuple[str, str], Tensor | None] = {}

    def vector(self, slot: str, bucket: Bucket, copy: bool = True) -> Vector:
        """fp32 [bucket.numel] called `slot`, before and after a reduction; see `Undoable.of`."""
        return self._vectors.setdefault(slot, Undoable()).of(bucket, copy)

    def narrow(self, slot: str, bucket: Bucket) -> None:
        """Keep nothing of the parameters of `bucket` in `slot` but its elements."""
        if slot in self._vectors:
            self._vectors[slot].kept.narrow(bucket.segments)

    def kept(self, bucket: Bucket, slot: str = _RESIDUAL) -> Tensor:
        """What stands in `slot` since the last commit; fp32 [bucket.numel]."""
        return self._vectors.setdefault(slot, Undoable()).kept.of(bucket)

    def tensor(self, slot: str, name: str, make: Callable[[], Tensor], device: str) -> Tensor:
        """The tensor called `slot` of parameter `name`, to be updated in place; `make()` gives its first value."""
        key = slot, name
        if key not in self._before:
            self._before[key] = self.tensors[key].clone() if key in self.tensors else None
        tensor = self.tensors[key] if key in self.tensors else make()
        self.tensors[key] = tensor.to(device)  # a loaded one may come from elsewhere
        return self.tensors[key]

    def commit(self) -> None:
        """The step has happened: what it made is what the next one finds."""
        for vector in self._vectors.values():
            vector.commit()
        self._before.clear()

    def rollback(self) -> None:
        """The step has not happened: the next one finds what this one found."""
        for vector in self._vectors.values():
            vector.rollback()
        for key, tensor in self._before.items():
            if tensor is None:
                del self.tensors[key]
            else:
                self.tensors[key] = tensor
        self._before.clear()

    def norm(self) -> float:
        """Euclidean norm of all residuals."""
        residuals = self._vectors.get(_RESIDUAL)
        squares = [K.stats(piece)[2].double().cpu() for piece in residuals.kept.all()] if residuals else []
        return float(torch.stack(squares).sum().sqrt()) if squares else 0.0

    def nbytes(self) -> int:
        """Bytes of all tensors held: two fp32 vectors for each memory (kept, running step), and named tensors."""
        vectors = [piece for v in self._vectors.values() for e in (v.kept, v.running) for piece in e.all()]
        return sum(tensor.numel() * tensor.element_size() for tensor in (*vectors, *self.tensors.values()))

    def state_dict(self, lengths: Mapping[str, int] | None = None) -> dict[str, Any]:
        """Copies as of the last commit: `vectors` as slot -> parameter -> first element -> fp32 [n], and `tensors` as
        slot -> parameter -> tensor.

        Args:
            lengths: of parameters, behind whose ends nothing is kept.
        """
        tensors: dict[str, dict[str, Tensor]] = {}
        for (slot, name), tensor in self.tensors.items():
            kept = self._before.get((slot, name), tensor)
            if kept is not None:
                tensors.setdefault(slot, {})[name] = kept.clone()
        vectors = {slot: vector.kept.state_dict(lengths or {}) for slot, vector in self._vectors.items()}
        return {"vectors": vectors, "tensors": tensors}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        self._vectors = {}
        for slot, vectors in saved["vectors"].items():
            self._vectors[slot] = Undoable()
            self._vectors[slot].load_state_dict(vectors)
        self._before.clear()
        self.tensors = {
            (slot, name): t.clone() for slot, named in saved["tensors"].items() for name, t in named.items()
        }


class CallSlots:
    """The state of one bucket for one reduction, as `core.call.Slots` describes it.

    For absent parameters a scheme finds zeros, and what it adds to them is added to what was there.

    Args:
        parts: the bucket is all that this rank is to remember of its parameters; a loaded state may hold more.
    """

    def __init__(self, state: State, bucket: Bucket, role: Role, absent: frozenset[str], parts: bool = False) -> None:
        self._state, self._bucket, self._parts = state, bucket, parts
        self._prefix = "" if role == "gradient" else f"{role}/"
        self._vectors: dict[str, Vector] = {}
        self._aside: dict[str, list[tuple[slice, Tensor]]] = {}
        places, start = [], 0
        for segment in bucket.segments:
            if segment.name in absent:
                places.append(slice(start, start + segment.numel))
            start += segment.numel
        self._absent = places

    def vector(self, slot: str, peer: int | None = None) -> Tensor:
        return self._take(slot, peer, copy=True).new

    def exchange(self, slot: str, peer: int | None = None) -> Vector:
        return self._take(slot, peer, copy=False)

    def tensor(self, slot: str, name: str, make: Callable[[], Tensor]) -> Tensor:
        return self._state.tensor(self._prefix + slot, name, make, self._bucket.device)

    def close(self) -> None:
        """The reduction is over, or given up."""
        for slot, aside in self._aside.items():
            old, new = self._vectors[slot]
            for place, values in aside:
                new[place] += values
                if old is not new:
                    old[place] = values
        self._aside.clear()

    def _take(self, slot: str, peer: int | None, copy: bool) -> Vector:
        key = self._prefix + (slot if peer is None else f"{slot}@{peer}")
        vector = self._vectors.get(key)
        if vector is None:
            if self._parts:
                self._state.narrow(key, self._bucket)
            vector = self._vectors[key] = self._state.vector(key, self._bucket, copy)
            if self._absent:
                self._aside[key] = [(place, vector.old[place].clone()) for place in self._absent]
                for place in self._absent:
                    vector.old[place] = 0
                    if copy:
                        vector.new[place] = 0
        return vector


def reshard(saved: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One state for every rank of a new world, from the states of all ranks of the old one.

    Each rank gets the mean of the old residuals: what is still owed to the averaged update stays the same whatever the
    number of ranks. (Handing out equal parts of their *sum* would scale it by the change of that number.) Where each
    rank of a node has its own part (`levels`), it is the mean over those that have it. Other memories of one value for
    each element are averaged alike; named tensors are those of the first rank. Step hooks begin anew.

    Raises:
        CompressionError: there are none, or they are of different steps.
    """
    if not saved:
        raise CompressionError("there is no state to reshard: give those of all ranks")
    if len({state["step"] for state in saved}) != 1:
        raise CompressionError(f"compression states to merge are of one step, not of {[s['step'] for s in saved]}")
    slots = dict.fromkeys(slot for state in saved for slot in state["vectors"])
    parts = saved[0].get("node", 1) > 1
    vectors = {slot: _mean([state["vectors"].get(slot, {}) for state in saved], parts) for slot in slots}
    return {**saved[0], "node": EVERY, "vectors": vectors, "hooks": []}


def _mean(saved: Sequence[Mapping[str, Mapping[int, Tensor]]], parts: bool) -> dict[str, dict[int, Tensor]]:
    """Mean over ranks of one memory; with `parts` over those that hold an element."""
    result = {}
    for name in dict.fromkeys(name for elements in saved for name in elements):
        pieces = [elements.get(name, {}) for elements in saved]
        length = max(int(start) + piece.numel() for kept in pieces for start, piece in kept.items())
        total, holders = torch.zeros(length, dtype=torch.float64), torch.zeros(length)
        for kept in pieces:
            for start, piece in kept.items():
                total[int(start) : int(start) + piece.numel()] += piece.cpu()
                holders[int(start) : int(start) + piece.numel()] += 1
        result[name] = {0: (total / (holders.clamp(min=1) if parts else len(saved))).float()}
    return result
