"""The six algorithms against plain PyTorch and against the theory of their message sizes."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from compression_plugins.errors import ConfigError
from compression_plugins.parameter_server import algorithms, messages
from compression_plugins.parameter_server.algorithms import Algorithm, Momentum, Prox, State
from compression_plugins.parameter_server.messages import Kind
from compression_plugins.parameter_server.options import Options
from compression_plugins.parameter_server.worker import draw, shard
from compression_plugins.triton_kernels import Key

from .world import data, linear, options, problem, simulation

SIX = ["acc_asyfpg", "acc_asylpg", "asyfpg", "asylpg", "qsvrg", "sparse_asylpg"]


def plain_svrg(chosen: Options, momentum: bool = False) -> torch.Tensor:
    """Serial proximal SVRG in plain PyTorch on the batches that the workers draw; worker t mod M makes step t."""
    model, (x, y) = linear(), data().tensors
    parameters = list(model.parameters())

    def gradient(at: torch.Tensor, which: torch.Tensor) -> torch.Tensor:
        nn.utils.vector_to_parameters(at, parameters)
        model.zero_grad()
        nn.functional.cross_entropy(model(x[which]), y[which]).backward()
        return nn.utils.parameters_to_vector([p.grad for p in parameters]).clone()

    at = nn.utils.parameters_to_vector(parameters).detach().clone()
    auxiliary, theta, ticket = at.clone(), chosen.theta, 0
    for _ in range(chosen.epochs):
        snapshot = at.clone()
        full = gradient(snapshot, torch.arange(len(x)))
        if momentum:
            at = theta * auxiliary + (1 - theta) * snapshot
        for _ in range(chosen.inner_steps or 0):
            rank = ticket % chosen.workers
            batch = torch.from_numpy(draw(chosen, rank, ticket, shard([rank], chosen.workers, len(x))))
            direction = gradient(at, batch) - gradient(snapshot, batch) + full
            step = chosen.lr / theta if momentum else chosen.lr
            moved = (auxiliary if momentum else at) - step * direction
            moved = moved.sign() * (moved.abs() - step * chosen.l1).clamp(min=0) / (1 + step * chosen.l2)
            at = theta * moved + (1 - theta) * snapshot if momentum else moved
            auxiliary = moved
            ticket += 1
        theta = (math.sqrt(theta**4 + 4 * theta**2) - theta**2) / 2
    return at


@pytest.mark.parametrize(("method", "momentum"), [("asyfpg", False), ("acc_asyfpg", True)])
@pytest.mark.parametrize("penalty", [{}, {"l1": 0.02, "l2": 0.1}])
def test_full_precision_without_delay_is_svrg(method: str, momentum: bool, penalty: dict[str, float]) -> None:
    chosen = options(method=method, tau=0, workers=3, inner_steps=12, **penalty)
    server = simulation(chosen).run()
    assert set(server.delays) == {0}
    assert torch.allclose(server.state.snapshot, plain_svrg(chosen, momentum), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("method", SIX)
def test_every_algorithm_reaches_the_optimum_despite_delays(method: str) -> None:
    chosen = options(method=method, epochs=10, inner_steps=20, lr=0.5, l2=0.1, tau=4)
    server = simulation(chosen, delays=[2, 0, 1, 4, 1]).run()
    losses = [row.loss for row in server.history]
    x, y = data().tensors
    weight = torch.zeros(2, 10, requires_grad=True)
    bias = torch.zeros(2, requires_grad=True)
    solver = torch.optim.LBFGS([weight, bias], max_iter=200, tolerance_grad=1e-9)

    def objective() -> torch.Tensor:
        loss = nn.functional.cross_entropy(x @ weight.T + bias, y)
        return loss + 0.05 * (weight.square().sum() + bias.square().sum())

    def closure() -> torch.Tensor:
        solver.zero_grad()
        loss = objective()
        loss.backward()
        return loss

    solver.step(closure)
    assert 0 <= losses[-1] - float(objective().detach()) + 1e-6 < 1e-4
    assert losses[0] - losses[-1] > 0.1


def test_the_listing_has_the_six_and_names_the_nearest() -> None:
    assert algorithms.names() == SIX
    assert all(algorithms.get(name).__doc__ for name in SIX)
    with pytest.raises(ConfigError, match="did you mean 'asylpg'"):
        algorithms.get("asylgp")


def test_a_seventh_algorithm_is_one_class(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(algorithms, "_ALGORITHMS", dict(algorithms._ALGORITHMS))

    @algorithms.register
    class AccSparse(algorithms.SparseAsyLPG):
        name = "acc_sparse"
        rule = Momentum()

    server = simulation(options(method="acc_sparse")).run()
    assert server.history[-1].survivors is not None and server.history[-1].loss < server.history[0].loss
    assert isinstance(algorithms.get("acc_sparse"), Algorithm)


@pytest.mark.parametrize("method", ["asyfpg", "acc_asyfpg"])
def test_full_precision_costs_64_bits_an_element_and_update_and_snapshots_64_a_worker(method: str) -> None:
    server = simulation(options(method=method)).run()
    numel, updates = server.numel, 3 * 12
    assert server.traffic.snapshot_bits == 3 * 3 * 64 * numel
    assert (server.traffic.down_bits, server.traffic.up_bits) == (updates * 32 * numel, updates * 32 * numel)
    assert server.traffic.bits == server.traffic.snapshot_bits + updates * 64 * numel


@pytest.mark.parametrize("method", ["asylpg", "qsvrg", "sparse_asylpg", "acc_asylpg"])
def test_the_bits_of_a_run_are_the_sum_of_its_messages(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[messages.Message] = []
    real = messages.parse_header

    def spy(*arguments: object) -> messages.Header:
        found = real(*arguments)  # type: ignore[arg-type]
        seen.append(found)  # type: ignore[arg-type]
        return found

    monkeypatch.setattr("compression_plugins.parameter_server.simulate.parse_header", spy)
    chosen = options(method=method, bits=5)
    server = simulation(chosen).run()
    numel, up, down = server.numel, 0, 0
    for head in seen:
        if head.kind is Kind.MODEL:
            down += 32 * numel if head.bits == 32 else (head.bits and 32 * math.ceil(head.bits * numel / 32) + 32) + 8
        elif head.kind is Kind.GRADIENT:
            assert head.bits in (0, 5)
            up += head.bits and 32 * math.ceil(5 * numel / 32) + 32
        elif head.kind in (Kind.INDICES, Kind.BITMAP):
            up += 8 * head.nbytes + 32
    assert (server.traffic.down_bits, server.traffic.up_bits) == (down, up)
    assert server.traffic.snapshot_bits == 3 * 3 * 64 * numel
    assert server.traffic.wire_bytes == sum(24 + head.nbytes for head in seen)


def state_at(distance: float) -> State:
    state = State.at(torch.linspace(-1, 1, 4000), 0.9)
    state.snapshot += distance / math.sqrt(4000)
    return state


def test_the_model_is_sent_with_exactly_the_bits_of_the_mu_rule() -> None:
    mu, key = options().mu, Key(0, 0, 0, 0)
    widths = [algorithms.mu_rule_model(state_at(2.0**-k), mu, key, 0).bits for k in range(9)]
    assert widths == list(range(widths[0], widths[0] + 9)), "one bit more each time the distance to x~ halves"
    assert any(width % 2 for width in widths), "odd widths are sent as they are"


def test_a_model_at_the_snapshot_sends_nothing_and_one_next_to_it_full_precision() -> None:
    mu, key = options().mu, Key(0, 0, 0, 0)
    at = algorithms.mu_rule_model(state_at(0.0), mu, key, 0)
    assert (at.bits, at.payload.numel()) == (0, 0)
    near = algorithms.mu_rule_model(state_at(1e-5), mu, key, 0)
    assert (near.bits, near.bits_counted) == (32, 32 * 4000)
    tiny = state_at(0.0)
    tiny.x[0] += 1e-30
    tiny.x[0] = torch.nextafter(tiny.x[0], torch.tensor(5.0))
    assert algorithms.mu_rule_model(tiny, mu, key, 0).bits == 32, "never mistaken for the snapshot"


def test_a_zero_difference_sends_nothing() -> None:
    for up in (algorithms.quantized_gradient, algorithms.sparse_gradient):
        message = up(torch.zeros(100), 8, 1.0, Key(0, 0, 0, 0), 4)
        assert (message.kind, message.bits, message.payload.numel()) == (Kind.GRADIENT, 0, 0)


def test_quantization_errors_vanish_with_the_distance_to_the_snapshot() -> None:
    """E||u - grad f(x_D)||^2 <= L^2 [(D0 + 1)(1 + mu) + mu] ||x_D - x~||^2 for batches of one; D0 = d/(4 L^2)."""
    chosen = options(batch_size=1, bits=4, mu=0.5)
    task, (inputs, _) = problem(), data().tensors
    smooth = 0.5 * float(inputs.square().sum(1).max() + 1)  # cross-entropy of two classes on rows of this norm
    start = task.start()
    everything = shard([0, 1, 2], 3, 90)
    for distance in (1.0, 0.1, 0.01):
        state = State.at(start, 0.9)
        state.x += distance * nn.functional.normalize(torch.ones(task.numel), dim=0)
        full = task.gradient(state.snapshot, everything, 0)[1]
        there = task.gradient(state.x, everything, 0)[1]
        errors = []
        for ticket in range(150):
            down = algorithms.get("asylpg").send_model(state, chosen.mu, chosen.seed, ticket, 0)
            batch = draw(chosen, 0, ticket, everything)
            alpha = task.gradient(messages.vector(down, task.numel), batch, 0)[1]
            alpha -= task.gradient(state.snapshot, batch, 0)[1]
            up = algorithms.get("asylpg").send_gradient(alpha, chosen.bits, 1.0, chosen.seed, ticket, 0)
            zeta = messages.vector(up, task.numel)
            errors.append((zeta + full - there).square().sum())
        ratio = task.numel / (4 * 7**2)
        bound = smooth**2 * ((ratio + 1) * 1.5 + 0.5) * distance**2
        assert torch.stack(errors).mean() <= bound


def test_the_l1_prox_makes_exact_zeros() -> None:
    server = simulation(options(method="asylpg", l1=0.05, epochs=6, inner_steps=30)).run()
    zeros = int((server.state.snapshot == 0).sum())
    assert 0 < zeros < server.numel


def test_prox_minimises_its_definition() -> None:
    x, step = torch.linspace(-2, 2, 41), 0.7
    prox = Prox(0.5, 0.3)
    z = prox(x.clone(), step)
    for nudge in (-1e-3, 1e-3):
        other = z + nudge
        here = 0.5 * z.abs() + 0.15 * z**2 + (z - x) ** 2 / (2 * step)
        there = 0.5 * other.abs() + 0.15 * other**2 + (other - x) ** 2 / (2 * step)
        assert bool((there >= here - 1e-6).all())
    assert prox.value(torch.tensor([1.0, -2.0])) == pytest.approx(0.5 * 3 + 0.15 * 5)
