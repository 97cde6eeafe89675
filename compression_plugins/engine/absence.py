"""Which tensors of a bucket hold nothing but zeros in a step: of these a rank has nothing to say."""

from __future__ import annotations

import torch
from torch import Tensor

from .plan import Bucket

_SAMPLES = 32  # elements of a tensor that are looked at before all of it is


class ZeroTensors:
    """Finds them on a CPU; on a GPU looking would mean waiting for it."""

    def __init__(self) -> None:
        self._places: dict[Bucket, Tensor] = {}

    def names(self, bucket: Bucket, flat: Tensor) -> frozenset[str]:
        """Parameters of `bucket` that are zero everywhere in `flat`, its elements."""
        if not flat.is_cpu or (bucket.scheme.host_dense and not bucket.direction.formed):
            return frozenset()
        places = self._places.get(bucket)
        if places is None:
            places = self._places[bucket] = _sample_places(bucket)
        live = flat[places].view(len(bucket.segments), -1).ne(0).any(1)
        if live.all():
            return frozenset()
        parts = flat.split([segment.numel for segment in bucket.segments])
        return frozenset(
            segment.name
            for segment, part, alive in zip(bucket.segments, parts, live.tolist())
            if not alive and not part.any()
        )


def _sample_places(bucket: Bucket) -> Tensor:
    """int64 [segments * samples]: places spread over each segment."""
    places, start = [], 0
    steps = torch.arange(_SAMPLES, dtype=torch.float64)
    for segment in bucket.segments:
        places.append(start + (steps * max(0, segment.numel - 1) / (_SAMPLES - 1)).long())
        start += segment.numel
    return torch.cat(places).clamp_(max=bucket.numel - 1)  # an empty segment may stand at the end
