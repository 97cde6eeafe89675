"""Law 1: with a codec that loses nothing every collective is the dense average."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from compression_plugins.codecs import Codec
from compression_plugins.collectives import dense_mean, gather_mean, ring_fold, square_rows, torus_fold, two_stage
from compression_plugins.core.call import Call, Reduction
from compression_plugins.core.memory import ERROR_FEEDBACK
from compression_plugins.transports.local import LocalWorld

from ..world import World, config, mean


@dataclass(frozen=True)
class Identity(Codec):
    """fp32 values as they are."""

    block: int = 32

    def nbytes(self, numel: int) -> int:
        return 4 * numel

    def encode(self, x, key, memory=None, residual=None, out=None) -> Tensor:  # noqa: ANN001
        p = x if memory is None else memory.compensate(x, residual)
        if memory is not None:
            memory.update(x, residual, p)
        payload = p.contiguous().view(torch.uint8).clone()
        return payload if out is None else out.copy_(payload)

    def decode(self, payload, numel, out=None, weight=1.0, accumulate=False) -> Tensor:  # noqa: ANN001
        x = payload.clone().view(torch.float32) * weight
        return x if out is None else out.add_(x) if accumulate else out.copy_(x)

    def merge(self, payloads, numel, key) -> Tensor:  # noqa: ANN001
        out = self.average(payloads, numel, torch.empty(numel))
        return out.view(torch.uint8)


class Collective(World):
    """Runs one collective, with the identity codec, in place of the scheme's own."""

    def __init__(self, size: int, run: Callable[[Tensor, Call], Reduction]) -> None:
        super().__init__(config("topk"), size)
        scheme = type("Probe", (type(self.bucket.scheme),), {"mean": lambda self, x, call: run(x, call)})()
        object.__setattr__(self.plan.buckets[0], "scheme", scheme)


def fold(x: Tensor, call: Call, rows: int | None = None) -> Reduction:
    """The mean by partial means, weighted with the numbers of ranks that `merge` is told."""
    length = -(-x.numel() // call.transport.size)
    padded = torch.zeros(length * call.transport.size)
    padded[: x.numel()] = x
    parts = list(padded.split(length))

    def merge(received: Tensor, own: Tensor, a: int, b: int) -> Tensor:
        return (a * received + b * own) / (a + b)

    if rows is None:
        parts = yield from ring_fold(call.transport, parts, merge)
    else:
        parts = yield from torus_fold(call.transport, parts, rows, merge)
    return torch.cat(parts)[: x.numel()]


COLLECTIVES = {
    "sum": lambda x, call: dense_mean(call, x),
    "gather": lambda x, call: gather_mean(Identity(), None, call, x),
    "gather with memory": lambda x, call: gather_mean(Identity(), ERROR_FEEDBACK, call, x),
    "two_stage with memory": lambda x, call: two_stage(Identity(), ERROR_FEEDBACK, call, x),
    "two_stage": lambda x, call: two_stage(Identity(), None, call, x),
    "ring": fold,
    "torus": lambda x, call: fold(x, call, square_rows(call.transport.size)),
    "torus of one column": lambda x, call: fold(x, call, call.transport.size),
}


@pytest.mark.parametrize("size", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("name", COLLECTIVES)
def test_identity_codec_gives_the_dense_average(name: str, size: int) -> None:
    world = Collective(size, COLLECTIVES[name])
    for step in range(3):
        gradients = world.gradients(step)
        results = world.step(gradients)
        assert all(torch.equal(r, results[0]) for r in results)
        if size <= 2:  # one addition, by a power of two: nothing to reorder and nothing to round
            assert torch.equal(results[0], sum(gradients) / size)
        torch.testing.assert_close(results[0].double(), mean(gradients), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_none_is_the_sum_in_rank_order_over_the_number_of_ranks(size: int) -> None:
    world = World(config("none"), size)
    gradients = world.gradients(0)
    assert torch.equal(world.step(gradients)[0], sum(gradients[1:], gradients[0]) / size)


@pytest.mark.parametrize("name", ["topk", "randomk", "scalecom"])
def test_keeping_every_value_is_the_dense_average(name: str) -> None:
    world = World(config(name, ratio=1.0 if name == "topk" else 1, **({"beta": 1.0} if name == "scalecom" else {})), 3)
    for step in range(3):
        gradients = world.gradients(step)
        torch.testing.assert_close(world.step(gradients)[0].double(), mean(gradients), rtol=1e-5, atol=1e-6)


def test_marsit_that_flushes_every_step_is_dense() -> None:
    world = World(config("marsit", flush_steps=1), 3)
    for step in range(3):
        gradients = world.gradients(step)
        torch.testing.assert_close(world.step(gradients)[0].double(), mean(gradients), rtol=1e-5, atol=1e-6)


def test_powersgd_is_exact_once_its_rank_covers_the_gradient() -> None:
    world = World(config("powersgd", rank=2), 2, {"w": (40, 30)})
    low_rank = torch.randn(40, 2) @ torch.randn(2, 30)
    gradients = [low_rank.flatten(), 3 * low_rank.flatten()]
    world.step(gradients)
    owed = world.memory()
    torch.testing.assert_close(world.step(gradients)[0].double(), mean(gradients) + owed, rtol=1e-3, atol=1e-3)


def test_scalecom_with_one_rank_is_top_k_with_error_feedback() -> None:
    scalecom = World(config("scalecom", ratio=10, beta=1.0, selection="exact"), 1)
    topk = World(config("topk", ratio=10.0), 1)
    for step in range(5):
        gradients = scalecom.gradients(step)
        torch.testing.assert_close(scalecom.step(gradients)[0], topk.step(gradients)[0])


def test_scalecom_leader_rotates_with_the_step_and_keeps_k_values() -> None:
    world = World(config("scalecom", ratio=10, beta=1.0), 3)
    for step in range(6):
        gradients = world.gradients(step)
        p = gradients[step % 3] + world.reducers[step % 3].state.kept(world.bucket)
        padded = torch.zeros(-(-p.numel() // 10) * 10)
        padded[: p.numel()] = p.abs()
        chosen = padded.view(-1, 10).argmax(1) + 10 * torch.arange(padded.numel() // 10)
        assert sorted(world.step(gradients)[0].nonzero().flatten().tolist()) == sorted(chosen.tolist())


def test_jobs_that_wait_for_a_rank_that_does_not_come_are_reported() -> None:
    world = LocalWorld(2)
    handle = world.transports[0].all_reduce(torch.ones(3))
    assert not handle.poll()
    with pytest.raises(RuntimeError, match="waits for a rank"):
        handle.wait()
