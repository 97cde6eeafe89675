"""What a scheme costs one rank, for any bucket and any number of ranks, from a few short runs of the scheme itself.

Up to `DIRECT` ranks a scheme is timed at that number, on two sizes of bucket; seconds are affine in elements. For more
ranks the kinds and numbers of operations still come from a run at the true number, on a bucket of a block per rank;
seconds are those of few ranks, plus what grows: calls per rank (shards), and the decoding of an all-gather whose
payload does not shrink with the number of ranks. Bytes are the recorded ones, times `wire_bytes` of the bucket over
those of the sample.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import torch

from ..core.call import Segment
from ..engine.marks import marks_bits
from ..engine.plan import Bucket
from ..schemes.base import Scheme
from .record import Operation, Trace, Work, clock, record, sent_bytes, slowest

__all__ = ["Codecs", "Operation", "Profile", "Work", "sent_bytes"]

DIRECT = 16  # ranks up to which everything is timed at the true number
_SMALL = 1 << 15
_LARGE, _LARGE_BEYOND = 1 << 21, 1 << 20  # elements of the larger sample, up to `DIRECT` ranks and beyond
_FEW, _MANY = 4, 64
_PIECES = 16
_GROWS = 1.5  # times slower with `_MANY` ranks than with `_FEW`, or it is noise that would be extrapolated
_GATHERED = 1 << 25  # bytes that an all-gather of a run at the true number may make


@dataclass(frozen=True)
class Profile:
    """What a scheme costs on a device; `work(bucket, size)` is its prediction for any bucket and number of ranks.

    Args:
        scheme: with its parameters.
        device: where it is timed.
        largest: elements of the largest bucket that will be asked for; the sample is no larger.
        scale: seconds per element there, over seconds per element here; for another device by its memory bandwidth.
        steps: timed steps; the median counts.
    """

    scheme: Scheme
    device: str = "cpu"
    largest: int = _LARGE
    scale: float = 1.0
    steps: int = 5

    def works(self, bucket: Bucket, size: int) -> list[Work]:
        """The kinds of steps of this bucket on `size` ranks; their shares add up to 1."""
        trace = self._at(size)
        sample = Bucket(self.scheme, tuple(trace.segments), self.device).wire_bytes(size)
        own = self.scheme.wire_bits(trace.segments, size)
        factor = self.scheme.wire_bits(bucket.segments, size) / own if own else 1.0
        other = self._seconds(trace.other, trace.pace_other, bucket, size, factor)
        if _structure(trace.first) == _structure(trace.other):
            return [other]
        first = self._seconds(trace.first, trace.pace_first, bucket, size, factor)
        usual, seldom = trace.other.sent(size), trace.first.sent(size)
        share = (sample - usual) / (seldom - usual) if seldom != usual else 0.0
        share = min(1.0, max(0.0, share))
        return [replace(other, share=1 - share), replace(first, share=share)]

    @cached_property
    def _cache(self) -> dict[Any, Any]:
        return {}

    def _sample(self, limit: int) -> int:
        return max(2 * _SMALL, min(limit, self.largest))

    def _trace(self, numel: int, size: int, pieces: int = 1, limit: float = float("inf")) -> Trace:
        """Ranks 0 and 1: of each stretch of code the longer one counts, for the others wait for it."""
        key = (numel, size, pieces, limit)
        if key not in self._cache:
            segments = _segments(numel, pieces)
            ranks = [0] if limit < float("inf") else range(min(2, size))
            steps = 0 if limit < float("inf") else self.steps
            traces = [record(self.scheme, segments, size, r, self.device, steps, limit) for r in ranks]
            self._cache[key] = Trace(*(slowest([trace[i] for trace in traces]) for i in range(2)))
        return self._cache[key]

    def _at(self, size: int) -> _Sampled:
        """Structure at `size` ranks, and the pace of both kinds of steps."""
        key = ("at", size)
        if key not in self._cache:
            if size <= DIRECT:
                numel = self._sample(_LARGE)
                large, small = self._trace(numel, size), self._trace(_SMALL, size)
                cut = self._trace(_SMALL, size, _PIECES)
                segments, shape = _segments(numel), large
                paces = [_pace(large[i], small[i], cut[i], numel) for i in range(2)]
            else:
                segments, shape = self._true(size)
                paces = [self._pace_beyond(i, size) for i in range(2)]
            self._cache[key] = _Sampled(tuple(segments), shape.first, shape.other, paces[0], paces[1])
        return self._cache[key]

    def _true(self, size: int) -> tuple[list[Segment], Trace]:
        """Operations at the true number of ranks, on a bucket of a few blocks per rank."""
        even = size * _block(self.scheme)
        numel = -(-_SMALL // even) * even
        trace = self._trace(numel, size, limit=_GATHERED)
        few = self._trace(_SMALL, _FEW)
        whole = [
            Work((*work.operations, *known.operations[len(work.operations) :]), work.after_s)
            if len(work.operations) < len(known.operations)
            else work
            for work, known in zip(trace, few)
        ]
        return _segments(numel), Trace(*whole)

    def _pace_beyond(self, kind: int, size: int) -> _Pace:
        numel = self._sample(_LARGE_BEYOND)
        small, many = self._trace(_SMALL, _FEW)[kind], self._trace(_SMALL, _MANY)[kind]
        large, larger = self._trace(numel, _FEW)[kind], self._trace(numel, DIRECT)[kind]
        pace = _pace(large, small, self._trace(_SMALL, _FEW, _PIECES)[kind], numel)
        last = large.operations[-1]
        gathered = last.kind == "all_gather" and larger.operations[-1].nbytes > 0.75 * last.nbytes
        calls, elements = [], []
        for i, (few_s, many_s) in enumerate(zip(_stretches(small), _stretches(many))):
            more = (size - _FEW) / (_MANY - _FEW) * (many_s - few_s) if many_s > _GROWS * few_s else 0.0
            growth = 0.0
            if gathered and i == 2:  # everyone decodes what everyone sent
                growth = max(0.0, (larger.after_s - large.after_s) / (DIRECT - _FEW) / numel) * (size - _FEW)
            calls.append(pace.call_s[i] + max(0.0, more - growth * _SMALL))
            elements.append(pace.element_s[i] + growth)
        return _Pace(tuple(calls), tuple(elements), pace.piece_s)

    def _seconds(self, shape: Work, pace: _Pace, bucket: Bucket, size: int, factor: float) -> Work:
        """`shape` with the seconds and bytes of `bucket`."""
        before, between, after = pace.seconds(bucket.numel, len(bucket.segments), self.scale)
        later = sum(op.repeat for op in shape.operations) - 1
        operations = []
        for i, op in enumerate(shape.operations):
            each = between / later if later else 0.0
            if i == 0 and op.repeat > 1:  # its first stretch is the encoding
                each = (before + (op.repeat - 1) * each) / op.repeat
            nbytes = op.nbytes * factor
            if i == 0 and not self.scheme.says_zero:  # the marks of zero rows go first, and count rows, not values
                nbytes = marks_bits(bucket.segments, 2) / 8
            operations.append(op._replace(code_s=before if i == 0 and op.repeat == 1 else each, nbytes=nbytes))
        return Work(tuple(operations), after)


class _Pace(NamedTuple):
    """Seconds of code before the first operation, between operations, after the last: a call, an element, a tensor."""

    call_s: tuple[float, ...]
    element_s: tuple[float, ...]
    piece_s: tuple[float, ...]

    def seconds(self, numel: int, pieces: int, scale: float) -> list[float]:
        return [
            call + scale * element * numel + piece * (pieces - 1)
            for call, element, piece in zip(self.call_s, self.element_s, self.piece_s)
        ]


class _Sampled(NamedTuple):
    segments: tuple[Segment, ...]
    first: Work
    other: Work
    pace_first: _Pace
    pace_other: _Pace


def _pace(large: Work, small: Work, cut: Work, numel: int) -> _Pace:
    elements = [max(0.0, (a - b) / (numel - _SMALL)) for a, b in zip(_stretches(large), _stretches(small))]
    calls = [max(0.0, s - e * _SMALL) for s, e in zip(_stretches(small), elements)]
    pieces = [max(0.0, (a - b) / (_PIECES - 1)) for a, b in zip(_stretches(cut), _stretches(small))]
    return _Pace(tuple(calls), tuple(elements), tuple(pieces))


def _stretches(work: Work) -> tuple[float, float, float]:
    """Seconds before the first operation, between operations, and after the last."""
    before = work.operations[0].code_s if work.operations else 0.0
    return before, work.code_s - before - work.after_s, work.after_s


def _structure(work: Work) -> list[tuple[str, float, int]]:
    return [(op.kind, op.nbytes, op.repeat) for op in work.operations]


def _segments(numel: int, pieces: int = 1) -> list[Segment]:
    """Matrices, as square as powers of two allow."""
    length = numel // pieces
    rows = 1 << (max(1, length).bit_length() - 1) // 2
    while length % rows:
        rows //= 2
    return [Segment(f"sample.{i}", 0, length, (rows, length // rows), length // rows) for i in range(pieces)]


def _block(scheme: Scheme) -> int:
    return max(512, scheme.codec.block) if scheme.codec is not None else 512


class Codecs:
    """Profiles of all schemes on a device, each measured once."""

    def __init__(self, device: str = "cpu", largest: int = _LARGE, scale: float = 1.0) -> None:
        self.device, self.largest, self.scale = device, largest, scale
        self._profiles: dict[Scheme, Profile] = {}
        self._sides: dict[Scheme, float] = {}

    def on(self, size: int) -> Callable[[Bucket], list[Work]]:
        """`works` for `size` ranks."""
        return lambda bucket: self.works(bucket, size)

    def works(self, bucket: Bucket, size: int) -> list[Work]:
        """The kinds of steps of `bucket` on `size` ranks, from a profile of its scheme that is measured once."""
        profile = self._profiles.get(bucket.scheme)
        if profile is None:
            profile = self._profiles[bucket.scheme] = Profile(bucket.scheme, self.device, self.largest, self.scale)
        return profile.works(bucket, size)

    def model_side(self, scheme: Scheme, numel: int) -> float:
        """Seconds per step to quantize weights of `numel` elements and to restore them; 0 for most schemes."""
        if scheme.weight_law is None:
            return 0.0
        if scheme not in self._sides:
            self._sides[scheme] = _hook_s(scheme, self.device, min(self.largest, _LARGE))
        return self._sides[scheme] * numel * self.scale


def _hook_s(scheme: Scheme, device: str, numel: int) -> float:
    """Seconds per element that a scheme's step hook takes."""
    parameter = torch.randn(numel, device=device)
    hook = scheme.step_hook({"sample": parameter}, 0)
    assert hook is not None
    now = clock(device)
    times = []
    for step in range(1, 6):
        began = now()
        hook.before_forward()
        hook.after_backward()
        acted = now()
        parameter.mul_(1.01)  # the optimizer
        again = now()
        hook.after_step(step)
        times.append(acted - began + now() - again)
    return statistics.median(times[2:]) / numel
