"""Local updates: what ranks that train by themselves have in common after an exchange, and what readers see before."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from compression_plugins.config import Config
from compression_plugins.errors import ConfigError
from compression_plugins.optimizer.local_updates import LocalUpdates
from compression_plugins.schemes import registry

from .replicas import RANKS, Cluster, net, no_first_row, own, same

TRAINING = [name for name in registry.names() if registry.get(name).trains]


def test_with_exact_averages_it_is_local_training_and_the_mean_of_the_weights() -> None:
    cluster, plain = Cluster(), Cluster(every=1)
    for step in range(8):
        cluster.step()
        for rank, optimizer in enumerate(plain.optimizers):
            plain.gradients(rank)
            optimizer.step()
        plain.steps += 1
        if step % 4 == 3:
            with torch.no_grad():
                for parameters in zip(*(model.parameters() for model in plain.models)):
                    mean = torch.stack(list(parameters)).mean(0)
                    for p in parameters:
                        p.copy_(mean)
        for rank in range(RANKS):
            for ours, theirs in zip(cluster.weights(rank), plain.weights(rank)):
                torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("nesterov", [False, True])
def test_the_outer_step_is_that_of_torch_sgd_on_the_mean_drift(nesterov: bool) -> None:
    cluster = Cluster(outer={"lr": 0.7, "momentum": 0.5, "nesterov": nesterov})
    anchors = [nn.Parameter(w) for w in cluster.weights(0)]
    outer = torch.optim.SGD(anchors, lr=0.7, momentum=0.5, nesterov=nesterov)
    for _ in range(3):
        for _ in range(3):
            cluster.step()
        before = cluster.hooks[0].state_dict()["anchors"]
        for anchor, kept in zip(anchors, before.values()):
            torch.testing.assert_close(anchor.detach(), kept, rtol=1e-5, atol=1e-6)
        ends: list[list[Tensor]] = []
        cluster.step(at_exchange=lambda hook, ends=ends: ends.append(own(hook)))
        for anchor, *weights in zip(anchors, *ends):
            anchor.grad = anchor.detach() - torch.stack(weights).mean(0)
        outer.step()
        for anchor, weight in zip(anchors, cluster.weights(0)):
            torch.testing.assert_close(anchor.detach(), weight, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("scheme", TRAINING)
def test_after_an_exchange_all_ranks_hold_the_same_bits(scheme: str) -> None:
    cluster = Cluster(scheme)
    for step in range(12):
        cluster.step()
        equal = [same(cluster.weights(0), cluster.weights(rank)) for rank in range(1, RANKS)]
        assert all(equal) if step % 4 == 3 else not any(equal)


@pytest.mark.parametrize("scheme", ["ef_signsgd", "topk", "scalecom", "powersgd"])
def test_what_an_exchange_applies_and_what_is_remembered_are_the_drifts(scheme: str) -> None:
    cluster = Cluster(scheme, exempt=["*bias"], **({"beta": 1.0} if scheme == "scalecom" else {}))
    first, total = cluster.weights(0), [torch.zeros_like(w) for w in cluster.weights(0)]

    def add(hook: LocalUpdates) -> None:
        for sum_, anchor, weights in zip(total, hook._anchors.values(), own(hook)):
            sum_ += (anchor - weights) / RANKS

    for _ in range(12):
        cluster.step(at_exchange=add)
    owed = {}
    for session in cluster.sessions:
        for name, pieces in session.reducer.state_dict()["vectors"].get("update/residual", {}).items():
            (piece,) = pieces.values()
            owed[name] = owed.get(name, 0) + piece / RANKS
    for (name, _), begin, end, drift in zip(cluster.models[0].named_parameters(), first, cluster.weights(0), total):
        left = owed.get(name, torch.zeros(drift.numel())).view_as(drift)
        torch.testing.assert_close(begin - end + left, drift, rtol=1e-4, atol=1e-5)


def test_readers_see_the_anchor_and_training_goes_on_where_it_was() -> None:
    cluster, undisturbed = Cluster("ef_signsgd"), Cluster("ef_signsgd")
    agreed = cluster.weights(0)
    for step in range(10):
        cluster.step()
        undisturbed.step()
        if step % 4 == 3:
            agreed = cluster.weights(0)
        for rank, session in enumerate(cluster.sessions):
            own = cluster.weights(rank)
            session.before_read()
            assert same(cluster.weights(rank), agreed)
            if step % 2:
                session.before_forward()
                assert same(cluster.weights(rank), own)
        with cluster.sessions[1].exact():
            assert same(cluster.weights(1), agreed)
    for rank in range(RANKS):
        for session in (cluster.sessions[rank], undisturbed.sessions[rank]):
            session.before_forward()
        assert same(cluster.weights(rank), undisturbed.weights(rank))


@pytest.mark.parametrize("scheme", ["ef_signsgd", "topk", "marsit"])
def test_a_write_in_the_middle_of_a_round_is_kept_to_the_last_bit(scheme: str) -> None:
    cluster = Cluster(
        scheme, optimizer=lambda p: torch.optim.SGD(list(p)[1:], lr=0.1)
    )  # the first weight only drifts by writes
    for step in range(6):
        cluster.step(edit=no_first_row if step == 1 else None)
        if step == 2:
            cluster.sessions[0].before_read()
            assert not next(cluster.models[0].parameters())[0].any(), "readers see the write at once"
        if step >= 3:
            assert not next(cluster.models[2].parameters())[0].any()
            assert next(cluster.models[2].parameters())[1].any()


def test_what_a_script_writes_after_an_exchange_belongs_to_the_next_round() -> None:
    cluster = Cluster("ef_signsgd")
    for step in range(9):
        cluster.step()
        if step == 3:  # the ranks have just met
            for model in cluster.models:
                model.get_parameter("0.weight").data[5].fill_(7.0)
    cluster.sessions[0].before_read()
    assert cluster.hooks[0].state_dict()["anchors"]["0.weight"][5].sub(7.0).abs().max() < 1.0


def test_weights_that_are_loaded_on_all_ranks_are_what_training_goes_on_from() -> None:
    cluster = Cluster("ef_signsgd", optimizer=lambda p: torch.optim.SGD(p, lr=0.0))
    other = {name: torch.full_like(p, 3.0) for name, p in net().named_parameters()}
    for step in range(8):
        cluster.step()
        if step == 1:
            for model in cluster.models:
                model.load_state_dict(other)
    assert all((w == 3.0).all() for w in cluster.weights(3))


@pytest.mark.parametrize("steps", [3, 4, 6])
@pytest.mark.parametrize("scheme", ["ef_signsgd", "scalecom"])
def test_a_resume_continues_bit_for_bit_in_the_middle_of_a_round_too(scheme: str, steps: int) -> None:
    settings = {"outer": {"lr": 0.8, "momentum": 0.3}}
    straight = Cluster(scheme, **settings)
    for _ in range(steps):
        straight.step()
    resumed = Cluster(scheme, **settings)
    resumed.steps = steps
    for rank in range(RANKS):
        with straight.sessions[rank].exact():
            resumed.models[rank].load_state_dict(straight.models[rank].state_dict())
        resumed.optimizers[rank].load_state_dict(deepcopy(straight.optimizers[rank].state_dict()))
        resumed.sessions[rank].load_state_dict(straight.sessions[rank].state_dict())
    for _ in range(7):
        straight.step()
        resumed.step()
        for rank in range(RANKS):
            assert same(straight.weights(rank), resumed.weights(rank))


def test_a_memory_that_begins_anew_makes_the_next_exchange_exact() -> None:
    cluster = Cluster("ef_signsgd")
    for _ in range(2):
        cluster.step()
    for session in cluster.sessions:
        session.load_hooks({})
    cluster.step()
    ends: list[list[Tensor]] = []
    cluster.step(at_exchange=lambda hook: ends.append(own(hook)))
    torch.testing.assert_close(cluster.weights(0)[0], torch.stack([weights[0] for weights in ends]).mean(0))
    assert same(cluster.weights(0), cluster.weights(3))


def test_ranks_average_gradients_during_the_warm_up_and_train_by_themselves_after_it() -> None:
    cluster = Cluster("ef_signsgd", warmup_steps=3)
    for step in range(11):
        cluster.step()
        assert same(cluster.weights(0), cluster.weights(1)) == (step < 3 or step in (6, 10))


def test_half_precision_parameters_lose_no_small_steps_to_rounding() -> None:
    """The anchor is fp32: drifts far below a bf16 step add up."""
    cluster = Cluster(optimizer=lambda p: torch.optim.SGD(p, lr=0.0), dtype=torch.bfloat16)
    for model in cluster.models:
        model.get_parameter("0.bias").data.fill_(1.0)
    bias = cluster.models[0].get_parameter("0.bias")
    for step in range(32):  # eight rounds, in each of which one rank of four moves by the smallest bf16 step above 1
        if step % 4 == 2:
            for session in cluster.sessions:
                session.before_forward()
            bias.data.add_(2**-7)
        cluster.step()
    assert torch.equal(bias.detach(), torch.full_like(bias, 1 + 2 * 2**-7))


def test_double_precision_parameters_are_averaged_in_double_precision() -> None:
    cluster = Cluster("ef_signsgd", dtype=torch.float64)
    for _ in range(3):
        cluster.step()
    ends: list[list[Tensor]] = []
    cluster.step(at_exchange=lambda hook: ends.append(own(hook)))
    for weight, *each in zip(cluster.weights(2), *ends):
        torch.testing.assert_close(weight, torch.stack(each).mean(0), rtol=1e-14, atol=1e-14)


def test_moments_are_averaged_where_the_configuration_says_so() -> None:
    local, mean = Cluster("ef_signsgd"), Cluster("ef_signsgd", outer={"moments": "mean"})
    for cluster in (local, mean):
        for _ in range(4):
            cluster.step()

    def moment(cluster: Cluster, rank: int) -> Tensor:
        p = next(cluster.models[rank].parameters())
        return cluster.optimizers[rank].state[p]["exp_avg_sq"]

    torch.testing.assert_close(moment(mean, 0), torch.stack([moment(local, r) for r in range(RANKS)]).mean(0))
    assert torch.equal(moment(mean, 0), moment(mean, 3))


def test_one_message_in_so_many_steps_is_all_that_travels() -> None:
    often, seldom = Cluster("ef_signsgd", every=2), Cluster("ef_signsgd", every=8)
    for _ in range(16):
        often.step()
        seldom.step()
    sent = [c.sessions[0].reducer.transport.sent for c in (often, seldom)]
    assert sent[0] == 4 * sent[1] > 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"every": 0}, "greater than or equal to 1"),
        ({"every": 1, "outer": {"lr": 0.5}}, "set every to 2 or more"),
        ({"outer": {"nesterov": True}}, "set outer.momentum"),
        ({"outer": {"momentun": 0.5}}, "did you mean 'momentum'"),
        ({"outer": {"lr": 0}}, "outer.lr = 0: input should be greater than 0"),
        ({"direction": "momentum"}, "set every to 1"),
    ],
)
def test_settings_that_mean_nothing_are_refused_in_one_sentence(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Config.load({"scheme": "ef_signsgd", "every": 4, **settings})
