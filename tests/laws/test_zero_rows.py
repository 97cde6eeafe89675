"""A code that has no word for zero: rows that are zero on every rank stay zero, and leave no trace in the residual."""

from __future__ import annotations

from itertools import groupby
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from compression_plugins.core.call import Segment
from compression_plugins.engine.marks import _zero_rows, marks_bits, rows_of
from compression_plugins.engine.plan import Bucket, Plan

from ..world import World, config
from .test_reduction import CASES

MARKED = [case for case in CASES if not config(case.values[0], **case.values[1]).scheme.says_zero]
#: What draws no random numbers, which the names of a bucket are part of.
SAME_DRAWS = [
    "bf16",
    "chunk_topk",
    "ef_signsgd",
    "fake",
    "fp16",
    "fp8",
    "none",
    "powersgd",
    "scalecom",
    "signsgd",
    "topk",
]


@st.composite
def pieces(draw: st.DrawFn) -> tuple[Segment, ...]:
    """Whole tensors and parts of them, which begin and end wherever they like."""
    found = []
    for number in range(draw(st.integers(1, 4))):
        width = draw(st.sampled_from([0, 1, 7, 32, 50, 64]))  # 0: fewer than two dimensions
        start = draw(st.integers(0, 150))
        found.append(Segment(f"w{number}", start, draw(st.integers(0 if number else 1, 200)), None, width))
    return tuple(found)


def row_of_each_element(segments: tuple[Segment, ...]) -> list[tuple[str, int]]:
    """(parameter, row) of every element of a bucket, one after another."""
    return [
        (segment.name, (segment.start + i) // segment.row if segment.row else 0)
        for segment in segments
        for i in range(segment.numel)
    ]


def lengths(segments: tuple[Segment, ...]) -> list[int]:
    return [len(list(group)) for _, group in groupby(row_of_each_element(segments))]


@given(segments=pieces(), size=st.integers(1, 9))
def test_rows_cover_a_bucket_without_gaps_whatever_cuts_it(segments: tuple[Segment, ...], size: int) -> None:
    place, found = 0, []
    for start, number, length in rows_of(segments):
        assert start == place and number > 0 and length > 0
        found += [length] * number
        place += number * length
    assert found == lengths(segments)
    assert marks_bits(segments, size) == (size - 1) * 32 * -(-len(found) // 32)


class Pieces(World):
    """Any segments as the only bucket."""

    def __init__(self, name: str, keys: dict[str, Any], size: int, segments: tuple[Segment, ...]) -> None:
        super().__init__(config(name, **keys), size)
        self.plan = Plan((Bucket(self.bucket.scheme, segments),), ())

    def blind(self) -> Pieces:
        """The same scheme marks nothing."""
        (bucket,) = self.plan.buckets
        word = property(lambda self: True)
        scheme = type("Blind", (type(bucket.scheme),), {"says_zero": word, "__module__": __name__})
        self.plan = Plan((Bucket(scheme(**bucket.scheme.model_dump()), bucket.segments),), ())
        return self


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize(("name", "variant"), MARKED)
@settings(deadline=None, max_examples=8)
@given(segments=pieces(), data=st.data())
def test_rows_that_are_zero_everywhere_stay_zero_and_others_are_as_if_nothing_were_marked(
    name: str, variant: dict, size: int, segments: tuple[Segment, ...], data: Any
) -> None:
    """Zero everywhere, on one rank only, or nowhere: row by row."""
    marked, blind = Pieces(name, variant, size, segments), Pieces(name, variant, size, segments).blind()
    row, rows = torch.tensor(places(segments)), lengths(segments)
    fate = torch.tensor(data.draw(st.lists(st.integers(0, 2), min_size=len(rows), max_size=len(rows))))
    dead, partly = (fate == 0)[row], (fate == 1)[row]
    steps = 2 if name == "marsit" else 1  # which begins with an exact average
    for step in range(steps):
        gradients = marked.gradients(step)
        for rank, gradient in enumerate(gradients):
            gradient[dead] = 0
            if not rank:
                gradient[partly] = 0
        results, expected = marked.step(gradients), blind.step(gradients)
        live = ~dead
        for rank, (result, plain) in enumerate(zip(results, expected)):
            assert not result[dead].any()
            assert torch.equal(result[live], plain[live])
            if marked.bucket.scheme.memory:
                residual = marked.reducers[rank].state.kept(marked.bucket)
                assert not residual[dead].any()
                assert torch.equal(residual[live], blind.reducers[rank].state.kept(marked.bucket)[live])
    sent, plain_sent = (world.local.transports[0].sent for world in (marked, blind))
    assert sent - plain_sent == pytest.approx(steps * (size - 1) * 4 * -(-len(rows) // 32))


def places(segments: tuple[Segment, ...]) -> list[int]:
    """The number of every element's row in the bucket."""
    return [i for i, length in enumerate(lengths(segments)) for _ in range(length)]


@pytest.mark.parametrize(("name", "variant"), MARKED)
def test_a_row_that_is_zero_but_owed_something_is_not_zero(name: str, variant: dict) -> None:
    """What a rank remembers of a row still goes out."""
    segments = (Segment("w", 0, 640, (10, 64), 64),)
    world = Pieces(name, variant, 2, segments)
    if not world.bucket.scheme.memory:
        return
    for step in range(2):
        world.step(world.gradients(step))
    before = world.memory()
    gradients = world.gradients(2)
    for gradient in gradients:
        gradient[128:192] = 0
    result = world.step(gradients)[0]
    owed: Tensor = world.memory()[128:192]
    assert before[128:192].any() and result[128:192].any()
    kept = variant.get("decay", 1.0) * before[128:192]
    torch.testing.assert_close(result[128:192] + owed, kept, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("name", "variant"), CASES)
@pytest.mark.parametrize("order", [(0, 1), (1, 0)], ids=["empty first", "empty last"])
def test_an_empty_tensor_may_share_a_bucket_with_others(name: str, variant: dict, order: tuple) -> None:
    both = (Segment("empty", 0, 0, (0, 30), 30), Segment("w", 0, 600, (20, 30), 30))
    world, alone = Pieces(name, variant, 2, tuple(both[i] for i in order)), Pieces(name, variant, 2, both[1:])
    for step in range(4):
        gradients = alone.gradients(step)
        for result, plain in zip(world.step(gradients), alone.step(gradients)):
            assert result.shape == plain.shape and result.isfinite().all()
            if name in SAME_DRAWS:
                assert torch.equal(result, plain)
        assert world.memory().isfinite().all()


@pytest.mark.parametrize("length", [1, 2, 7, 100])
def test_one_element_anywhere_in_the_gradient_or_the_memory_makes_a_row_count(length: int) -> None:
    """On a CPU a row is judged by a few of its elements first; the others decide all the same."""
    rows = ((0, length + 1, length),)
    lone = torch.cat([torch.eye(length), torch.zeros(1, length)]).flatten()  # element i of row i, and a row of zeros
    expected = [False] * length + [True]
    nothing = torch.zeros_like(lone)
    for gradient, memory in ((lone, None), (lone, nothing), (nothing, lone)):
        assert _zero_rows(gradient, memory, rows).tolist() == expected
