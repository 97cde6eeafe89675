"""ECQ-SGD's memory as LoCo has it, against LoCo's own recursion."""

from __future__ import annotations

import pytest
import torch

from compression_plugins.codecs import Uniform
from compression_plugins.triton_kernels import Key

from ..world import World, config


@pytest.mark.parametrize("sharded", [False, True])
def test_alpha_and_reset_steps_are_the_memory_of_loco(sharded: bool) -> None:
    world = World(config("ecq_sgd", alpha=0.2, reset_steps=4), 2)
    numel, codec = world.bucket.numel, Uniform(4, 64, "absmax", "nearest")
    shards = [1216, numel - 1216] if sharded else None  # whole blocks
    e = [torch.zeros(numel) for _ in range(2)]
    for step in range(10):
        gradients = world.gradients(step)
        average = torch.zeros(numel)
        for rank, g in enumerate(gradients):
            if step in (4, 8):
                e[rank].zero_()
            h = g + e[rank]
            q = codec.decode(codec.encode(h, Key(0, 0, 0, 0, 0)), numel)
            e[rank] = 0.8 * e[rank] + (1 - 0.8) * (h - q)
            average += q / 2
        one, other = world.reduce(gradients, shards)
        for reducer in world.reducers:
            reducer.end_step()
        torch.testing.assert_close(torch.cat([one[:1216], other[1216:]]), average, rtol=0, atol=2e-5)
