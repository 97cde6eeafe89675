"""DeepSpeed's 1-bit optimizers. The oracles are torch's optimizers, and the papers' formulas in fp64."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import Any

import pytest
import torch
from torch import Tensor

from compression_plugins.errors import ConfigError, UnsupportedError
from compression_plugins.optimizer.one_bit import OneBit, OneBitAdam, OneBitLamb, ZeroOneAdam

SHAPES = [(6, 5), (5,), (3, 4)]
BETAS = (0.8, 0.9)
CLASSES: dict[str, tuple[type[OneBit], dict[str, Any]]] = {
    "adam": (OneBitAdam, {"freeze_step": 4}),
    "lamb": (OneBitLamb, {"freeze_step": 4}),
    "zero_one": (
        ZeroOneAdam,
        {"var_freeze_step": 9, "var_update_scaler": 2, "local_step_scaler": 3, "local_step_clipper": 4},
    ),
}


class Table:
    """Where ranks, each in a thread, meet to average exactly; `after` is what a code does to the average."""

    def __init__(self, size: int, after: Callable[[Tensor], Tensor] = lambda x: x) -> None:
        self.barrier, self.seats, self.after = Barrier(size), [[] for _ in range(size)], after
        self.roles: list[str] = []

    def mean(self, rank: int, vectors: list[Tensor], role: str) -> None:
        self.seats[rank] = [vector.clone() for vector in vectors]
        self.barrier.wait(30)
        means = [self.after(torch.stack(each).mean(0)) for each in zip(*self.seats)]
        self.barrier.wait(30)
        for vector, value in zip(vectors, means):
            vector.copy_(value)
        if rank == 0:
            self.roles.append(role)


class Seat:
    """The ranks as one of them sees them."""

    def __init__(self, table: Table, rank: int) -> None:
        self.table, self.rank, self.averages = table, rank, True

    def mean(self, vectors: dict[Tensor, Tensor], role: str) -> None:
        self.table.mean(self.rank, list(vectors.values()), role)

    def average_gradients(self, on: bool) -> None:
        self.averages = on


class World:
    """`size` ranks with one optimizer each; the host's own average of gradients included."""

    def __init__(self, which: str, size: int = 2, after: Any = None, **keys: Any) -> None:
        cls, own = CLASSES[which]
        self.table = Table(size, *([after] if after else []))
        start = [torch.randn(shape, generator=torch.Generator().manual_seed(i)) for i, shape in enumerate(SHAPES)]
        self.ranks = []
        for rank in range(size):
            parameters = [value.clone().requires_grad_() for value in start]
            optimizer = cls(parameters, **{"lr": 0.05, "betas": BETAS, **own, **keys})
            seat = Seat(self.table, rank)
            optimizer.bind(seat)
            self.ranks.append((parameters, optimizer, seat))
        self.size, self.step_number = size, 0

    def gradients(self, step: int) -> list[list[Tensor]]:
        """Of every rank and tensor."""
        draw = torch.Generator().manual_seed(1000 + step)
        return [[torch.randn(shape, generator=draw) for shape in SHAPES] for _ in range(self.size)]

    def step(self, gradients: list[list[Tensor]] | None = None) -> None:
        gradients = gradients or self.gradients(self.step_number)
        self.step_number += 1
        average = [torch.stack(each).mean(0) for each in zip(*gradients)]

        def one(rank: int) -> None:
            parameters, optimizer, seat = self.ranks[rank]
            for p, own, mean in zip(parameters, gradients[rank], average):
                p.grad = (mean if seat.averages else own).clone()
            optimizer.step()

        with ThreadPoolExecutor(self.size) as pool:
            list(pool.map(one, range(self.size)))

    def weights(self, rank: int = 0) -> list[Tensor]:
        return [p.detach() for p in self.ranks[rank][0]]


def mean(gradients: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    return [torch.stack(list(each)).double().mean(0) for each in zip(*gradients)]


@pytest.mark.parametrize("which", ["adam", "zero_one"])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_before_the_freeze_it_is_torchs_adam_bit_for_bit(which: str, decay: float) -> None:
    keys = {"freeze_step": 10} if which == "adam" else {"var_update_scaler": 16, "var_freeze_step": 99}
    world = World(which, weight_decay=decay, **keys)
    expected = [value.clone().requires_grad_() for value in world.weights()]
    kind = torch.optim.AdamW if decay else torch.optim.Adam
    torchs = kind(expected, lr=0.05, betas=BETAS, weight_decay=decay)
    for step in range(10):
        gradients = world.gradients(step)
        for p, g in zip(expected, zip(*gradients)):
            p.grad = torch.stack(g).mean(0)
        torchs.step()
        world.step(gradients)
        for ours, theirs in zip(world.weights(), expected):
            assert torch.equal(ours, theirs)
    assert world.table.roles == []


@pytest.mark.parametrize("corrected", [True, False])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_one_bit_adam_with_exact_averages_is_adam_with_a_frozen_variance(corrected: bool, decay: float) -> None:
    world = World("adam", 3, bias_correction=corrected, weight_decay=decay)
    w = [value.double().clone() for value in world.weights()]
    m, v = ([torch.zeros_like(each) for each in w] for _ in range(2))
    for step in range(1, 10):
        gradients = world.gradients(step - 1)
        world.step(gradients)
        for i, g in enumerate(mean(gradients)):
            m[i] = BETAS[0] * m[i] + (1 - BETAS[0]) * g
            v[i] = BETAS[1] * v[i] + (1 - BETAS[1]) * g * g if step <= 4 else v[i]
            top = m[i] / (1 - BETAS[0] ** step) if corrected else m[i]
            under = v[i] / (1 - BETAS[1] ** min(step, 4)) if corrected else v[i]
            w[i] -= 0.05 * (top / (under.sqrt() + 1e-8) + decay * w[i])
            torch.testing.assert_close(world.weights()[i].double(), w[i], rtol=1e-5, atol=1e-5)
        assert world.ranks[0][1].adam_freeze_key == (step >= 4)
    assert world.table.roles == ["update"] * 5


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_one_bit_lamb_with_exact_averages_is_what_the_papers_say(decay: float) -> None:
    world = World("lamb", 2, bias_correction=False, weight_decay=decay)
    w = [value.double().clone() for value in world.weights()]
    m, v, fresh = ([torch.zeros_like(each) for each in w] for _ in range(3))
    frozen, last = [0.0] * 3, [1.0] * 3
    for step in range(1, 12):
        gradients = world.gradients(step - 1)
        world.step(gradients)
        coefficients = []
        for i, g in enumerate(mean(gradients)):
            m[i] = BETAS[0] * m[i] + (1 - BETAS[0]) * g
            if step <= 4:
                v[i] = BETAS[1] * v[i] + (1 - BETAS[1]) * g * g
                fresh[i] = v[i].clone()
                update = m[i] / (v[i].sqrt() + 1e-8) + decay * w[i]
                coefficient = float((w[i].norm() / update.norm()).clamp(0.01, 10))
                frozen[i] = 0.9 * frozen[i] + 0.1 * coefficient
            else:
                fresh[i] = BETAS[1] * fresh[i] + (1 - BETAS[1]) * g * g
                adam = m[i] / (v[i].sqrt() + 1e-8)
                update = adam + decay * w[i]
                factor = float(((v[i].sqrt() + 1e-8) / (fresh[i].sqrt() + 1e-8)).max())
                if decay:
                    share = min(1.0, float(adam.norm() / update.norm()))
                    factor = factor * share + 1 - share
                factor = min(max(factor, 0.5), 4.0)
                last[i] = min(max(factor, 0.9 * last[i]), 1.1 * last[i])
                coefficient = frozen[i] * last[i]
            coefficients.append(coefficient)
            w[i] -= 0.05 * coefficient * update
            torch.testing.assert_close(world.weights()[i].double(), w[i], rtol=1e-4, atol=1e-5)
        assert world.ranks[0][1].get_lamb_coeffs() == pytest.approx(coefficients, rel=1e-3)
    assert world.table.roles == ["update"] * 7


def test_one_bit_lamb_sends_every_tensor_at_the_mean_size_of_all() -> None:
    world = World("lamb", 2, freeze_step=2)
    sizes: list[list[float]] = []

    def watch(x: Tensor) -> Tensor:
        sizes[-1].append(float(x.norm() / x.numel() ** 0.5))
        return x

    world.table.after = watch
    for step in range(3):
        sizes.append([])
        gradients = [[0.01**i * g for i, g in enumerate(own)] for own in world.gradients(step)]
        world.step(gradients)
    assert max(sizes[-1]) < 4 * min(sizes[-1]), "though one tensor's gradients are 10,000 times another's"


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_zero_one_adam_with_exact_averages_is_what_the_paper_says(decay: float) -> None:
    world = World("zero_one", 3, bias_correction=False, weight_decay=decay)
    w = [[value.double().clone() for value in world.weights()] for _ in range(3)]
    anchor = [each.clone() for each in w[0]]
    m = [[torch.zeros_like(each) for each in w[0]] for _ in range(3)]
    v = [torch.zeros_like(each) for each in w[0]]
    u = [[torch.zeros_like(each) for each in w[0]] for _ in range(3)]
    rates, met = 0.0, []
    for step in range(1, 25):
        gradients = world.gradients(step - 1)
        world.step(gradients)
        averages, local = mean(gradients), step > 9
        rates += 0.05 * local
        for i in range(3):
            if step in (1, 2, 3, 5, 7):
                v[i] = BETAS[1] * v[i] + (1 - BETAS[1]) * averages[i] ** 2
            for rank in range(3):
                g = gradients[rank][i].double() if local else averages[i]
                m[rank][i] = BETAS[0] * m[rank][i] + (1 - BETAS[0]) * g
                move = -0.05 * (m[rank][i] / (v[i].sqrt() + 1e-8) + decay * w[rank][i])
                w[rank][i] = w[rank][i] + move
                u[rank][i] = u[rank][i] + move if local else u[rank][i]
        # intervals 1, 2 and 4, of three steps each, then 4: it is never more
        if step in (10, 11, 12, 14, 16, 20, 24):
            met.append(step)
            for i in range(3):
                exchanged = sum(u[rank][i] * (v[i].sqrt() + 1e-8) for rank in range(3)) / 3
                anchor[i] = anchor[i] + exchanged / (v[i].sqrt() + 1e-8)
                for rank in range(3):
                    m[rank][i], w[rank][i] = -exchanged / rates, anchor[i].clone()
                    u[rank][i] = torch.zeros_like(exchanged)
            rates = 0.0
            assert all(torch.equal(a, b) for a, b in zip(world.weights(0), world.weights(2)))
        elif not local:
            anchor = [each.clone() for each in w[0]]
        for rank in range(3):
            for ours, expected in zip(world.weights(rank), w[rank]):
                torch.testing.assert_close(ours.double(), expected, rtol=1e-4, atol=1e-4)
    assert world.table.roles == ["gradient"] * 4 + ["update"] * len(met)


@pytest.mark.parametrize("which", CLASSES)
def test_ranks_hold_the_same_bits_after_an_exchange_whatever_a_code_makes_of_it(which: str) -> None:
    world = World(which, 3, after=lambda x: x.sign() * x.abs().mean())
    for _ in range(24):
        world.step()
    assert "update" in world.table.roles
    for rank in (1, 2):
        assert all(torch.equal(a, b) for a, b in zip(world.weights(0), world.weights(rank)))


@pytest.mark.parametrize("which", CLASSES)
def test_a_mask_keeps_what_a_sign_cannot_say_and_is_the_scripts_alone(which: str) -> None:
    world = World(which, 2, after=lambda x: x.sign() * x.abs().mean() + 1e-3)
    for _, optimizer, _ in world.ranks:
        (group,) = optimizer.param_groups
        first, *others = group["params"]
        group["params"] = [first]
        optimizer.add_param_group({"params": others})
        optimizer.param_groups[0]["exp_avg_mask"] = torch.ones(6, 5).index_fill(0, torch.tensor([2]), 0.0)
    start = world.weights()[0][2].clone()
    for step in range(12):
        gradients = world.gradients(step)
        for own in gradients:
            own[0][2] *= 1e-4 if step < 2 else 0.0
        world.step(gradients)
    moved = (world.weights()[0][2] - start).abs().max()
    optimizer = world.ranks[0][1]
    assert optimizer.state[world.ranks[0][0][0]]["exp_avg"][2].abs().max() < 1e-4
    assert float(moved) < 0.5
    mask = optimizer.param_groups[0]["exp_avg_mask"]
    saved = copy.deepcopy(optimizer.state_dict())
    saved["param_groups"][0]["exp_avg_mask"] = torch.zeros(6, 5)
    saved["param_groups"][1]["exp_avg_mask"] = torch.zeros(5)
    optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["exp_avg_mask"] is mask and "exp_avg_mask" not in optimizer.param_groups[1]


@pytest.mark.parametrize("which", CLASSES)
def test_what_has_no_variance_does_not_move(which: str) -> None:
    world = World(which, 2, after=lambda x: x.sign() * 0.1 + 0.01)
    start = world.weights()[0][4].clone()
    for step in range(12):
        gradients = world.gradients(step)
        for own in gradients:
            own[0][4] = 0.0
        world.step(gradients)
    assert torch.equal(world.weights()[0][4], start)


@pytest.mark.parametrize(("which", "at"), [("adam", 2), ("adam", 7), ("lamb", 2), ("lamb", 7), ("zero_one", 6)])
def test_a_saved_state_continues_bit_for_bit_in_its_phase(which: str, at: int) -> None:
    whole, resumed = World(which), World(which)
    for _ in range(at):
        whole.step()
    for (new, optimizer, seat), (old, saved, other) in zip(resumed.ranks, whole.ranks):
        with torch.no_grad():
            for p, value in zip(new, old):
                p.copy_(value)
        optimizer.load_state_dict(copy.deepcopy(saved.state_dict()))
        assert seat.averages == other.averages and optimizer.steps == at
    resumed.step_number = at
    for _ in range(5):
        whole.step()
        resumed.step()
    assert all(torch.equal(a, b) for a, b in zip(whole.weights(), resumed.weights()))


def test_a_state_from_between_two_exchanges_starts_anew_from_the_weights_that_are_loaded() -> None:
    world, resumed = World("zero_one"), World("zero_one")
    for _ in range(18):  # two steps into an interval of four
        world.step()
    for parameters, optimizer, _ in resumed.ranks:
        with torch.no_grad():
            for p, value in zip(parameters, world.weights(0)):
                p.copy_(value)
        optimizer.load_state_dict(copy.deepcopy(world.ranks[0][1].state_dict()))
        assert not any("momentum_accumulator" in state for state in optimizer.state.values())
    resumed.step_number = 18
    for _ in range(2):
        resumed.step()
    assert all(torch.equal(a, b) for a, b in zip(resumed.weights(0), resumed.weights(1)))


@pytest.mark.parametrize(
    ("cls", "keys", "says"),
    [
        (OneBitAdam, {"freeze_step": 0}, "freeze_step must be a whole number of 1 or more, not 0"),
        (OneBitAdam, {"amsgrad": True}, "no AMSGrad variant"),
        (OneBitAdam, {"betas": (0.9, 1.0)}, "betas must be two numbers"),
        (OneBitAdam, {"lr": -1.0}, "must not be negative"),
        (OneBitLamb, {"factor_min": 5.0}, "factor_min <= factor_max"),
        (ZeroOneAdam, {"var_update_scaler": 1.5}, "var_update_scaler must be a whole number"),
        (ZeroOneAdam, {"local_step_clipper": True}, "local_step_clipper must be a whole number"),
    ],
)
def test_a_value_out_of_range_is_named(cls: type[OneBit], keys: dict[str, Any], says: str) -> None:
    with pytest.raises((ConfigError, UnsupportedError)) as caught:
        cls([torch.ones(2, requires_grad=True)], **keys)
    assert says in str(caught.value)


def test_a_sparse_gradient_is_refused() -> None:
    p = torch.ones(3, 2, requires_grad=True)
    p.grad = torch.sparse_coo_tensor([[1]], [[1.0, 1.0]], (3, 2))
    with pytest.raises(UnsupportedError, match="sparse=False"):
        OneBitLamb([p]).step()
