"""The memory that the table at start-up names is what a rank keeps."""

from __future__ import annotations

import pytest

from compression_plugins.optimizer.directions import KINDS

from ..world import World, config
from .test_reduction import SCHEMES


def kept(world: World) -> int:
    """Bytes of all vectors on a rank, of which there are two each."""
    vectors = world.reducers[0].state_dict()["vectors"].values()
    return 2 * sum(4 * piece.numel() for named in vectors for parts in named.values() for piece in parts.values())


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_table_names_the_memory_of_a_scheme(scheme: str) -> None:
    world = World(config(scheme), 2)
    for step in range(2):
        world.step(world.gradients(step))
    assert world.plan.memory_bytes() == kept(world)
    assert (f"{kept(world) / 1e6:.3f} MB of memory" in world.plan.table(2)) == bool(kept(world))


@pytest.mark.parametrize("kind", KINDS)
def test_the_table_names_the_moments_of_a_direction(kind: str) -> None:
    own = {"kind": kind, **({"refresh": 2} if kind == "zero_one_adam" else {})}
    world = World(config("ef_signsgd", direction=own, warmup_steps=1), 2)
    for step in range(3):
        world.step(world.gradients(step))
    assert world.plan.memory_bytes() == kept(world)
    assert world.plan.memory_bytes() == world.reducers[0].state.nbytes() - sum(
        tensor.numel() * tensor.element_size() for tensor in world.reducers[0].state.tensors.values()
    )
