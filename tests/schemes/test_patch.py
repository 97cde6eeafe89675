"""A patch makes the old vector the new one, bit for bit, and is never longer than the new one."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from compression_plugins.codecs.patch import apply_patch, changed, encode_patch, patch_bytes
from compression_plugins.errors import CompressionError

DTYPES = {torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.float32: torch.int32}


def vectors(numel: int, changes: int, dtype: torch.dtype, seed: int) -> tuple[Tensor, Tensor]:
    """Any bits at all, NaNs and infinities among them; the second differs from the first in `changes` places."""
    kind, generator = DTYPES[dtype], torch.Generator().manual_seed(seed)
    limit = torch.iinfo(kind)
    old = torch.randint(limit.min, limit.max, (numel,), dtype=kind, generator=generator)
    new = old.clone()
    new[torch.randperm(numel, generator=generator)[:changes]] ^= 1 << 8 * kind.itemsize - 2
    return old.view(dtype), new.view(dtype)


@settings(max_examples=150, deadline=None)
@given(
    numel=st.integers(0, 3000),
    part=st.sampled_from([0.0, 0.001, 0.02, 0.3, 0.9, 1.0]),
    dtype=st.sampled_from(list(DTYPES)),
    seed=st.integers(0, 99),
)
def test_a_patch_restores_every_bit(numel: int, part: float, dtype: torch.dtype, seed: int) -> None:
    old, new = vectors(numel, round(numel * part), dtype, seed)
    places = changed(new, old)
    assert places.tolist() == (new.view(DTYPES[dtype]) != old.view(DTYPES[dtype])).nonzero().flatten().tolist()
    payload = encode_patch(new, places)
    assert payload.numel() == patch_bytes(len(places), numel, dtype.itemsize) <= 8 + -(-numel * dtype.itemsize // 8) * 8
    apply_patch(payload, old)
    assert torch.equal(old.view(torch.uint8), new.view(torch.uint8))


@pytest.mark.parametrize("changes", [10, 100, 1000, 10_000])
def test_places_cost_two_bits_and_the_logarithm_of_the_gap(changes: int) -> None:
    numel = 100_000
    bits = 8 * patch_bytes(changes, numel, 2) - 16 * changes
    assert bits <= changes * (2 + math.log2(numel / changes)) + 8 * 24


def test_zero_and_its_negative_are_different_weights() -> None:
    assert changed(torch.tensor([0.0, 1.0]), torch.tensor([-0.0, 1.0])).tolist() == [0]


def test_a_patch_from_elsewhere_is_refused_before_anything_is_written() -> None:
    old, new = vectors(1000, 30, torch.bfloat16, 1)
    good = encode_patch(new, changed(new, old))
    many, far, cut = good.clone(), good.clone(), good[:-8]
    many[:8].view(torch.int64).fill_(1 << 40)
    far[8:].fill_(255)  # places of ones only: more of them than announced
    last = encode_patch(new[:990], torch.tensor([989]))
    last[8:16].zero_()
    kept = old.clone()
    for bad, numel in ((many, 1000), (far, 1000), (cut, 1000), (good, 900), (last, 990), (good[:4], 1000)):
        with pytest.raises(CompressionError, match="patch"):
            apply_patch(bad, old[:numel])
    beyond = encode_patch(torch.zeros(100, dtype=torch.bfloat16), torch.tensor([99]))
    with pytest.raises(CompressionError, match="beyond the end"):
        apply_patch(beyond, old[:80])
    assert torch.equal(old.view(torch.uint8), kept.view(torch.uint8))
