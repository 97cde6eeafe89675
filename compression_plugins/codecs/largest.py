"""The k largest magnitudes of a long vector."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

_SAMPLES = 1 << 14


def largest(x: Tensor, k: int) -> Tensor:
    """Places (int64 [k], in no order) of the k largest |x|. Exact; among equal values any may be taken.

    On CPU `torch.topk` sorts far more than it must. There a strided sample gives a threshold that about 2k values pass,
    and only those are compared; should fewer than k pass, everything is.
    """
    magnitude = x.abs()
    if x.is_cpu and x.numel() > 4 * _SAMPLES and k <= x.numel() // 8:
        sample = magnitude[:: x.numel() // _SAMPLES]
        passing = min(sample.numel(), -(-2 * k * sample.numel() // x.numel()) + 8)
        threshold = sample.kthvalue(sample.numel() - passing + 1).values
        candidates = (magnitude >= threshold).nonzero().flatten()
        if candidates.numel() >= k:
            return candidates[magnitude[candidates].topk(k, sorted=False).indices]
    return magnitude.topk(k, sorted=False).indices
