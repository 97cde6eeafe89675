"""A short payload is gathered in one round, a long one goes by the owners of its shards."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from compression_plugins.collectives import in_one_round, payloads
from compression_plugins.transports.base import Transport

from ..world import World, config, mean

_LIMIT = 1 << 17
#: 8 bits a value and a scale of 32 bits for 512 values: with four ranks, the limit is 86,700 values.
_SHORT, _LONG = {"w": (860, 100)}, {"w": (875, 100)}


@pytest.fixture(autouse=True)
def long_payloads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Instead of conftest's: the limit as it is."""
    assert payloads._WORTH_A_ROUND == _LIMIT


@pytest.fixture
def rounds(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The operations that all ranks start."""
    found: list[str] = []
    for name in ("all_gather", "all_to_all", "all_reduce"):
        original = getattr(Transport, name)
        monkeypatch.setattr(
            Transport, name, lambda self, *args, name=name, run=original: found.append(name) or run(self, *args)
        )
    return found


def world(shapes: dict[str, tuple[int, ...]]) -> World:
    return World(config("double_quantization", bits=8, block=512, weights=False), 4, shapes)


@given(nbytes=st.integers(0, 1 << 40), size=st.integers(1, 4096))
def test_a_round_is_saved_for_at_most_128_kib_and_always_where_it_costs_nothing(nbytes: int, size: int) -> None:
    more = (size - 1) * nbytes - 2 * (size - 1) / size * nbytes
    assert in_one_round(nbytes, size) == (more <= _LIMIT)


@pytest.mark.parametrize(
    ("shapes", "operations"), [(_SHORT, ["all_gather"]), (_LONG, ["all_to_all", "all_gather"])], ids=["short", "long"]
)
def test_short_payloads_meet_in_one_round_and_long_ones_in_two(
    shapes: dict[str, tuple[int, ...]], operations: list[str], rounds: list[str]
) -> None:
    ranks = world(shapes)
    ranks.step(ranks.gradients(0))
    assert rounds == [operation for operation in operations for _ in range(4)]


@pytest.mark.parametrize("shapes", [_SHORT, _LONG], ids=["short", "long"])
def test_either_way_all_ranks_end_with_the_same_bits_near_the_mean_and_send_what_wire_bits_say(
    shapes: dict[str, tuple[int, ...]],
) -> None:
    ranks = world(shapes)
    gradients = ranks.gradients(0)
    first, *others = ranks.step(gradients)
    assert all(torch.equal(first, other) for other in others)
    assert 1e-4 < (first.double() - mean(gradients)).norm() / mean(gradients).norm() < 0.02
    counted = sum(t.sent for t in ranks.local.transports) * 8 / 4
    assert counted == pytest.approx(8 * ranks.bucket.wire_bytes(4), rel=1e-9)
