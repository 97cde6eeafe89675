"""What top-k promises beyond the laws of every scheme: which values it sends when its memory decays."""

from __future__ import annotations

import pytest
import torch

from ..world import World, config, mean


@pytest.mark.parametrize("decay", [1.0, 0.8])
def test_each_rank_sends_the_largest_of_the_gradient_and_of_what_has_not_faded(decay: float) -> None:
    """m <- decay m + g, then m less its k largest values, in float64."""
    world = World(config("topk", ratio=10.0, decay=decay), 3)
    memories = [torch.zeros(world.bucket.numel, dtype=torch.float64) for _ in range(3)]
    for step in range(5):
        gradients, sent = world.gradients(step), []
        for rank, gradient in enumerate(gradients):
            m = decay * memories[rank] + gradient
            places = m.abs().topk(round(world.bucket.numel / 10)).indices
            sent.append(torch.zeros_like(m).index_copy_(0, places, m[places]))
            memories[rank] = m - sent[rank]
        torch.testing.assert_close(world.step(gradients)[0].double(), mean(sent), rtol=0, atol=1e-5)
        for m, reducer in zip(memories, world.reducers):
            torch.testing.assert_close(reducer.state.kept(world.bucket).double(), m, rtol=0, atol=1e-5)
