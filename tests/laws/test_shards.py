"""Payloads of many shards: made and read by few kernels, and the same bytes as one by one."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from compression_plugins.codecs import Cast, Codec, Sign, TwoMagnitudes, Uniform
from compression_plugins.collectives.shards import decode_shards, encode_shards, even_shards
from compression_plugins.core.memory import ERROR_FEEDBACK, Vector
from compression_plugins.schemes.signsgd import Vote
from compression_plugins.triton_kernels import Key

KEY = Key(seed=1, tensor=2, step=3, rank=0)
CODECS: dict[str, Codec] = {
    "sign": Sign(64),
    "2 bits": Uniform(2, 32),
    "two magnitudes": TwoMagnitudes(32),
    "4 bits": Uniform(4, 64, "l2"),
    "8 bits": Uniform(8, 96, rounding="nearest"),
    "16 bits": Uniform(16, 32, rounding="nearest"),
    "bf16": Cast("bf16"),
    "fp16": Cast("fp16"),
    "fp8": Cast("fp8", 64),
    "one scale for all": Vote(0.5),
}


def one_by_one(codec: Codec, x: Tensor, shards: list[int], residual: Tensor | None) -> list[Tensor]:
    payloads, memory, counter = [], None if residual is None else ERROR_FEEDBACK, 0
    for part, owed in zip(x.split(shards), [None] * len(shards) if residual is None else residual.split(shards)):
        key = KEY._replace(offset=counter)
        payloads.append(
            codec.encode(part, key, memory, Vector(owed, owed) if memory else None)
            if len(part)
            else torch.empty(0, dtype=torch.uint8)
        )
        counter += -(-len(part) // 8) * 8  # no two shards share a random number
    return payloads


@pytest.mark.parametrize("name", CODECS)
@settings(deadline=None, max_examples=40)
@given(
    numel=st.integers(1, 3000),
    size=st.integers(1, 9),
    even=st.booleans(),
    with_memory=st.booleans(),
    data=st.data(),
)
def test_shards_have_the_payloads_that_each_has_by_itself(
    name: str, numel: int, size: int, even: bool, with_memory: bool, data: Any
) -> None:
    codec = CODECS[name]
    if even:
        shards = even_shards(numel, size, data.draw(st.sampled_from([2, codec.block])))
    else:
        cuts = sorted(data.draw(st.lists(st.integers(0, numel), min_size=size - 1, max_size=size - 1)))
        shards = [b - a for a, b in zip([0, *cuts], [*cuts, numel])]
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    x = torch.randn(numel, generator=generator)
    owed = torch.randn(numel, generator=generator) if with_memory and name != "one scale for all" else None
    expected_owed = None if owed is None else owed.clone()
    residual = None if owed is None else Vector(owed, torch.full_like(owed, 7.0))
    expected = one_by_one(codec, x, shards, expected_owed)
    found = encode_shards(codec, x, shards, KEY, None if owed is None else ERROR_FEEDBACK, residual)
    assert torch.equal(found, torch.cat(expected))
    if owed is not None:
        assert torch.equal(residual.new, expected_owed)
    longest = codec.nbytes(max(shards))
    slots = torch.full((size, longest), 255, dtype=torch.uint8)
    for slot, payload in zip(slots, expected):
        slot[: len(payload)] = payload
    values = [codec.decode(p, n) if n else torch.empty(0) for p, n in zip(expected, shards)]
    assert torch.equal(decode_shards(codec, slots, shards, torch.empty(numel)), torch.cat(values))


@dataclass(frozen=True)
class Counted(Uniform):
    """Counts its calls."""

    calls: list[str] = field(default_factory=list)

    def encode(self, *args: Any, **kwargs: Any) -> Tensor:
        self.calls.append("encode")
        return super().encode(*args, **kwargs)

    def decode(self, *args: Any, **kwargs: Any) -> Tensor:
        self.calls.append("decode")
        return super().decode(*args, **kwargs)


@pytest.mark.parametrize("size", [3, 100, 1000])
def test_kernels_are_called_as_often_for_a_thousand_shards_as_for_three(size: int) -> None:
    codec, numel = Counted(8, 32, rounding="stochastic"), 32 * size * 2 - 17  # the last shard is a short one
    shards = even_shards(numel, size, codec.block)
    payloads = encode_shards(codec, torch.randn(numel), shards, KEY, None, None).split(
        [codec.nbytes(n) for n in shards]
    )
    slots = torch.zeros(size, codec.nbytes(shards[0]), dtype=torch.uint8)
    for slot, payload in zip(slots, payloads):
        slot[: len(payload)] = payload
    decode_shards(codec, slots, shards, torch.empty(numel))
    assert codec.calls == ["encode", "encode", "decode", "decode"]
