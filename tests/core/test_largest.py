"""Sampling changes the speed of top-k, never its result."""

from __future__ import annotations

import pytest
import torch

from compression_plugins.codecs.largest import largest


@pytest.mark.parametrize("k", [1, 100, 3000, 12_000, 100_000])
@pytest.mark.parametrize("shape", ["normal", "spiky at the stride", "constant", "zeros"])
def test_the_k_largest_are_those_of_topk(k: int, shape: str) -> None:
    x = torch.randn(100_003, generator=torch.Generator().manual_seed(0))
    if shape == "spiky at the stride":
        x[::6] *= 1e6  # the sample sees only these and sets the threshold far too high
    if shape == "constant":
        x.fill_(-3.0)
    if shape == "zeros":
        x.zero_()
    places = largest(x, k)
    assert places.unique().numel() == k
    assert torch.equal(x[places].abs().sort().values, x.abs().topk(k).values.flip(0))


def test_a_vector_that_is_not_finite_still_has_k_places() -> None:
    assert largest(torch.full((100_000,), torch.nan), 10).unique().numel() == 10
