"""No two draws of a step share a stream of random numbers."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from compression_plugins.core.call import Call
from compression_plugins.core.streams import Purpose, of, stream
from compression_plugins.engine.plan import Bucket, Segment
from compression_plugins.engine.reducer import Reducer
from compression_plugins.errors import CompressionError
from compression_plugins.schemes.base import Scheme
from compression_plugins.transports.echo import EchoTransport
from compression_plugins.triton_kernels import Key

from ..world import config

DRAWS = st.tuples(st.sampled_from(Purpose), st.integers(0, (1 << 16) - 1), st.integers(0, (1 << 12) - 1))


@given(one=DRAWS, other=DRAWS)
def test_streams_are_equal_only_for_the_same_draw(one: Any, other: Any) -> None:
    assert (stream(*one) == stream(*other)) == (one == other)
    assert 0 <= stream(*one) < 1 << 32


@given(draw=DRAWS, purpose=st.sampled_from(Purpose), hop=st.integers(0, (1 << 12) - 1))
def test_another_purpose_of_a_key_stays_within_its_micro_batch(draw: Any, purpose: Purpose, hop: int) -> None:
    _, micro_batch, _ = draw
    key = Key(1, 2, 3, 4, stream(*draw))
    assert of(key, purpose, hop) == Key(1, 2, 3, 4, stream(purpose, micro_batch, hop))


@pytest.mark.parametrize(
    ("micro_batch", "hop", "message"),
    [
        (1 << 16, 0, "65,536 times, not 65,537"),
        (-1, 0, "65,536 times"),
        (0, 1 << 12, "4,096 ranks, not 4,097"),
        (0, -1, "4,096 ranks"),
    ],
)
def test_draws_that_would_repeat_are_refused(micro_batch: int, hop: int, message: str) -> None:
    with pytest.raises(CompressionError, match=message):
        stream(Purpose.MERGE, micro_batch, hop)


def test_a_step_of_three_hundred_micro_batches_repeats_no_stream() -> None:
    """As a reducer hands them out: the own message, and the second stage."""
    seen: list[int] = []

    class Watch(Scheme):
        name: ClassVar[str] = "watch"
        paper: ClassVar[str] = "-"

        def mean(self, x: torch.Tensor, call: Call) -> Any:
            seen.extend([call.key.stream, of(call.key, Purpose.OWNER).stream])
            yield call.transport.all_reduce(x)
            return x

    bucket = Bucket(Watch(), (Segment("w", 0, 4),))
    reducer = Reducer(config("topk"), EchoTransport(0, 2))
    for _ in range(301):
        reducer.reduce(bucket, torch.ones(4))
    assert len(set(seen)) == len(seen) == 602
    reducer.end_step()
    reducer.reduce(bucket, torch.ones(4))
    assert seen[-2:] == seen[:2], "the step stands elsewhere in the key"
