"""What a scheme says that it can do, it does; what it cannot, it refuses by name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from compression_plugins.core.call import Call, Reduction, Segment
from compression_plugins.core.clock import Clock
from compression_plugins.core.memory import Vector
from compression_plugins.core.streams import Purpose, stream
from compression_plugins.engine.driver import Engine
from compression_plugins.engine.plan import Bucket
from compression_plugins.engine.state import CallSlots, State
from compression_plugins.errors import UnsupportedError
from compression_plugins.schemes import registry
from compression_plugins.schemes.base import Scheme
from compression_plugins.transports.echo import EchoTransport
from compression_plugins.transports.local import LocalWorld, drive
from compression_plugins.triton_kernels import Key

from ..world import config

OPERATIONS = ["mean", "scatter_mean", "gather", "mix"]
NUMEL = 3080
FINE = {"bf16": 2**-8, "fp16": 2**-11}  # relative error of what is nearly as it was
WEIGHTS = {0: 0.5, 1: 0.25, -1: 0.25}


def having(operation: str) -> list[str]:
    return [name for name in registry.names() if operation in config(name).scheme.operations]


class Ranks:
    """Ranks that run any operation of one scheme on one bucket."""

    def __init__(self, name: str, size: int, shards: Sequence[int] | None = None) -> None:
        self.scheme: Scheme = config(name).scheme
        self.bucket = Bucket(self.scheme, (Segment("w", 0, NUMEL),), role="parameter")
        self.size, self.shards, self.steps = size, shards, 0
        self.transports = LocalWorld(size).transports
        self.states = [State() for _ in range(size)]

    def call(self, rank: int) -> Call:
        transport, clock = self.transports[rank].scoped("w"), Clock(self.steps, 0, self.steps)
        slots = CallSlots(self.states[rank], self.bucket, "parameter", frozenset())
        return Call(transport, self.key(rank), clock, self.bucket.segments, self.shards, slots, "parameter")

    def key(self, rank: int) -> Key:
        return Key(3, self.bucket.id, self.steps, rank, stream(Purpose.ENCODE))

    def run(self, values: Sequence[Tensor], program: Callable[[Tensor, Call], Reduction]) -> list[Tensor]:
        engine = Engine(ordered=False)
        works = [engine.run(program(x.clone(), self.call(rank))) for rank, x in enumerate(values)]
        drive(works)
        for state in self.states:
            state.commit()
        self.steps += 1
        return [work.result() for work in works]

    def residual(self, rank: int) -> Tensor:
        return self.states[rank].kept(self.bucket, "parameter/residual")

    def decoded(self, rank: int, x: Tensor, part: slice = slice(0, NUMEL)) -> Tensor:
        """What `rank` would send of `x` now, as others read it."""
        codec, memory = self.scheme.codec, self.scheme.memory
        assert codec is not None
        old = self.residual(rank)[part]
        residual = Vector(old, torch.empty_like(old)) if memory else None
        return codec.decode(codec.encode(x, self.key(rank), memory, residual), x.numel())


def draw(numel: int, seed: int) -> Tensor:
    return torch.randn(numel, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shards", [[1540, 1540], [NUMEL, 0], [1000, 80, 2000], [0, 3079, 1]], ids=str)
@pytest.mark.parametrize("name", having("gather"))
def test_a_gather_gives_every_rank_what_the_owners_payloads_say(name: str, shards: list[int]) -> None:
    ranks = Ranks(name, len(shards), shards)
    bounds = torch.tensor([0, *shards]).cumsum(0).tolist()
    own = [slice(a, b) for a, b in zip(bounds, bounds[1:])]
    came_in, sent = torch.zeros(NUMEL, dtype=torch.float64), torch.zeros(NUMEL, dtype=torch.float64)
    for step in range(3):
        values = [draw(n, 10 * step + rank) for rank, n in enumerate(shards)]
        expected = torch.cat([ranks.decoded(r, x, own[r]) if len(x) else x for r, x in enumerate(values)])
        first, *others = ranks.run(values, ranks.scheme.gather)
        assert all(torch.equal(first, other) for other in others) and torch.equal(first, expected)
        if name in FINE:
            torch.testing.assert_close(first, torch.cat(values), rtol=FINE[name], atol=1e-6)
        if ranks.scheme.memory:
            came_in, sent = came_in + torch.cat(values), sent + first
            remembered = torch.cat([ranks.residual(r)[part] for r, part in enumerate(own)])
            torch.testing.assert_close(sent + remembered, came_in, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", [n for n in having("gather") if config(n).scheme.memory])
def test_a_gather_leaves_what_is_remembered_of_the_shards_of_others_alone(name: str) -> None:
    """It may become this rank's own: shards move when ranks come or go."""
    ranks = Ranks(name, 2, [1000, 2080])
    for rank, state in enumerate(ranks.states):
        state.vector("parameter/residual", ranks.bucket).new.copy_(draw(NUMEL, 70 + rank))
        state.commit()
    for step in range(3):
        ranks.run([draw(n, step) for n in (1000, 2080)], ranks.scheme.gather)
        assert torch.equal(ranks.residual(0)[1000:], draw(NUMEL, 70)[1000:])
        assert torch.equal(ranks.residual(1)[:1000], draw(NUMEL, 71)[:1000])


@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize("name", having("mix"))
def test_a_mix_is_the_weighted_mean_of_what_the_neighbours_payloads_say(name: str, size: int) -> None:
    ranks = Ranks(name, size)

    def program(x: Tensor, call: Call) -> Reduction:
        return ranks.scheme.mix(x, call, WEIGHTS)

    def mixed(vectors: Sequence[Tensor]) -> list[Tensor]:
        return [sum(w * vectors[(rank - o) % size] for o, w in WEIGHTS.items()) for rank in range(size)]

    came_in, sent = torch.zeros(NUMEL, dtype=torch.float64), torch.zeros(NUMEL, dtype=torch.float64)
    for step in range(3):
        values = [draw(NUMEL, 10 * step + rank) for rank in range(size)]
        said = [ranks.decoded(rank, x) for rank, x in enumerate(values)]
        results = ranks.run(values, program)
        for result, expected, exact in zip(results, mixed(said), mixed(values)):
            torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))
            if name in FINE:
                torch.testing.assert_close(result, exact, rtol=0, atol=FINE[name] * 5)
        if ranks.scheme.memory:  # the weights of a message add up to 1, so the mean over ranks is conserved
            came_in, sent = came_in + torch.stack(values).double().mean(0), sent + torch.stack(results).double().mean(0)
            remembered = torch.stack([ranks.residual(rank) for rank in range(size)]).double().mean(0)
            torch.testing.assert_close(sent + remembered, came_in, rtol=0, atol=1e-5)
    neighbours = min(2, size - 1)
    nbytes = ranks.scheme.codec.nbytes(NUMEL) if ranks.scheme.codec else 0
    assert [transport.sent for transport in ranks.transports] == [3 * neighbours * nbytes] * size


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("name", registry.names())
def test_a_scheme_has_the_operations_that_it_declares_and_refuses_the_others(name: str, operation: str) -> None:
    ranks = Ranks(name, 2, [NUMEL // 2] * 2)
    ranks.transports = [EchoTransport(rank, 2) for rank in range(2)]  # type: ignore[assignment]
    more: list[Any] = [WEIGHTS] if operation == "mix" else []
    x = draw(NUMEL // 2 if operation == "gather" else NUMEL, 0)

    def run() -> Tensor:
        return Engine(False).run(getattr(ranks.scheme, operation)(x, ranks.call(0), *more)).result()

    if operation in ranks.scheme.operations:
        assert run().shape == (NUMEL,)
    else:
        with pytest.raises(UnsupportedError, match=f"'{name}' cannot {operation}; what it can do: .*mean"):
            run()
