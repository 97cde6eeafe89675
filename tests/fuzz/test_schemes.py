"""Every scheme through its collective with damaged messages: one error or wrong numbers, never more, and it goes on.

Never more: no access outside of a tensor (the process would not survive it), no other shape, no state that the next
clean step notices after `abort`.
"""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from compression_plugins.engine.reducer import Reducer
from compression_plugins.errors import CompressionError
from compression_plugins.schemes import registry
from compression_plugins.transports.local import LocalWorld, drive

from ..world import SHAPES, World, config
from .damage import CASES, Damaging, damaged

SIZE = 3
SCHEMES = [(name, {}) for name in registry.names()] + [
    ("marsit", {"form": "ring"}), ("marsit", {"form": "torus"}), ("scalecom", {"selection": "exact"}),
    ("scalecom", {"values": "bf16"}), ("chunk_topk", {"values": "bf16"}), ("chunk_topk", {"values": "8bit"}),
    ("topk", {"verify": True}),
]  # fmt: skip


class Fuzzed:
    """One scheme on `SIZE` ranks, of which rank 1 may receive damaged messages."""

    def __init__(self, name: str, keys: dict[str, object]) -> None:
        self.config = config(name, **keys)
        self.world = World(self.config, SIZE, SHAPES)
        self.change: dict[int, object] = {}
        self.count = 0
        self.gradients = [self.world.gradients(seed) for seed in range(3)]
        self.fresh()

    def fresh(self) -> None:
        """Reducers that have done one clean step."""
        self.reducers = self._reducers()
        self.step(0)

    def _of(self, rank: int):  # noqa: ANN202
        def change(result: Tensor, kind: str) -> Tensor:
            if rank != 1 or not self.change:
                return result
            self.count += 1
            return self.change[0](result, kind) if self.count == self.change[1] else result  # type: ignore[operator]

        return change

    def replace_world(self) -> None:
        """The same reducers, their memory included, over new connections."""
        states = [reducer.state_dict() for reducer in self.reducers]
        self.reducers = self._reducers()
        for reducer, state in zip(self.reducers, states):
            reducer.load_state_dict(state)

    def _reducers(self) -> list[Reducer]:
        transports = [Damaging(t, self._of(rank)) for rank, t in enumerate(LocalWorld(SIZE).transports)]
        return [Reducer(self.config, transport) for transport in transports]

    def step(self, seed: int) -> list[Tensor]:
        works = [r.start(self.world.bucket, g.clone()) for r, g in zip(self.reducers, self.gradients[seed])]
        drive(works)
        results = [work.result() for work in works]
        for reducer in self.reducers:
            reducer.end_step()
        return results

    def damaged_step(self, change: object, at: int) -> list[Tensor] | BaseException:
        """What the ranks end with, or the error; then the step is thrown away."""
        self.change, self.count = {0: change, 1: at}, 0
        try:
            works = [r.start(self.world.bucket, g.clone()) for r, g in zip(self.reducers, self.gradients[1])]
            drive(works)
            return [work.result() for work in works]
        except Exception as error:
            return error
        finally:
            self.change = {}
            for reducer in self.reducers:
                reducer.abort()


@pytest.mark.parametrize(("name", "keys"), SCHEMES, ids=lambda value: str(value))
def test_damaged_bytes_give_one_error_or_wrong_numbers_and_nothing_that_stays(name: str, keys: dict) -> None:
    run, dice = Fuzzed(name, keys), random.Random(1)
    expected = run.step(2)
    run.fresh()
    for case in range(max(4, CASES // len(SCHEMES))):
        seed = dice.randrange(2**32)
        found = run.damaged_step(lambda x, kind, seed=seed: damaged(x, random.Random(seed)), dice.randrange(1, 4))
        if isinstance(found, BaseException):
            assert isinstance(found, CompressionError), f"case {case}: {type(found).__name__}: {found}"
            assert len(str(found).splitlines()) == 1
        else:
            assert all(x.shape == (run.world.bucket.numel,) and x.dtype == torch.float32 for x in found)
        if isinstance(found, BaseException):  # messages that others have posted stay in this world; not in a real one
            run.replace_world()
        if case % 8 == 7:  # it goes on as if nothing had been
            assert all(torch.equal(a, b) for a, b in zip(run.step(2), expected)), f"case {case}: something stayed"
            run.fresh()
