"""Local updates: what ranks that train by themselves have in common after an exchange, and what readers see before."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from compression_plugins.config import Config
from compression_plugins.engine.session import Session
from compression_plugins.engine.state import reshard
from compression_plugins.errors import ConfigError, UnsupportedError
from compression_plugins.optimizer.local_updates import LocalUpdates, Outer
from compression_plugins.schemes import registry
from compression_plugins.transports.local import LocalWorld, drive
from tests.world import SHORT

TRAINING = [name for name in registry.names() if registry.get(name).trains]
RANKS = 4


def net(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(20, 40), nn.Tanh(), nn.Linear(40, 3)).to(dtype)


class Cluster:
    """Ranks with a replica, an optimizer and a session each; `step` is one optimizer step of all."""

    def __init__(
        self,
        scheme: str = "none",
        ranks: int = RANKS,
        optimizer: Callable[[Iterator[nn.Parameter]], torch.optim.Optimizer] = lambda p: torch.optim.Adam(p, lr=0.01),
        dtype: torch.dtype = torch.float32,
        **settings: Any,
    ) -> None:
        config = Config.load({"scheme": scheme, "min_numel": 0, "every": 4, **SHORT.get(scheme, {}), **settings})
        self.models = [net(dtype) for _ in range(ranks)]
        self.optimizers = [optimizer(model.parameters()) for model in self.models]
        self.sessions = [Session("test", config, dict(model.named_parameters())) for model in self.models]
        for session, transport in zip(self.sessions, LocalWorld(ranks).transports):
            session.make_hooks()
            session.start(transport)
        self.steps = 0

    @property
    def hooks(self) -> list[LocalUpdates]:
        return [hook for session in self.sessions for hook in session.hooks if isinstance(hook, LocalUpdates)]

    def gradients(self, rank: int) -> None:
        model, session = self.models[rank], self.sessions[rank]
        generator = torch.Generator().manual_seed(1000 * self.steps + rank)
        dtype = next(model.parameters()).dtype
        x = torch.randn(8, 20, generator=generator).to(dtype)
        y = torch.randint(3, (8,), generator=generator)
        session.before_forward()
        self.optimizers[rank].zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        session.after_backward()

    def step(
        self,
        edit: Callable[[nn.Module], None] | None = None,
        at_exchange: Callable[[LocalUpdates], None] | None = None,
    ) -> None:
        for rank in range(len(self.models)):
            self.gradients(rank)
        if not self.sessions[0].reducer.local:
            self.average_gradients()
        due, works = self.sessions[0].reducer.round_ends, list[Any]()
        for model, optimizer, session, hook in zip(self.models, self.optimizers, self.sessions, self.hooks):
            if edit is not None:
                edit(model)
            session.after_backward()
            optimizer.step()
            hook.stepped()
            if due and at_exchange is not None:
                at_exchange(hook)
            if due:
                works += hook.start_exchange(optimizer)
        if due:
            drive(works)
            for hook in self.hooks:
                hook.finish_exchange()
        for session in self.sessions:
            session.reducer.end_step()
        self.steps += 1

    def average_gradients(self) -> None:
        for parameters in zip(*(model.parameters() for model in self.models)):
            mean = torch.stack([p.grad for p in parameters]).mean(0)
            for p in parameters:
                p.grad = mean.clone()

    def weights(self, rank: int) -> list[Tensor]:
        return [p.detach().clone() for p in self.models[rank].parameters()]


def own(hook: LocalUpdates) -> list[Tensor]:
    return [p.detach().clone() for p in hook._parameters.values()]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b))


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


def _no_first_row(model: nn.Module) -> None:
    with torch.no_grad():
        next(model.parameters())[0].zero_()


@pytest.mark.parametrize("scheme", ["ef_signsgd", "topk", "marsit"])
def test_a_write_in_the_middle_of_a_round_is_kept_to_the_last_bit(scheme: str) -> None:
    cluster = Cluster(
        scheme, optimizer=lambda p: torch.optim.SGD(list(p)[1:], lr=0.1)
    )  # the first weight only drifts by writes
    for step in range(6):
        cluster.step(edit=_no_first_row if step == 1 else None)
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


def _mid_round(scheme: str = "ef_signsgd", **settings: Any) -> Cluster:
    cluster = Cluster(scheme, **settings)
    for _ in range(6):
        cluster.step()
    return cluster


def test_what_a_script_writes_while_the_anchor_is_shown_stays_and_the_rest_comes_back() -> None:
    cluster = _mid_round()
    model, session, before = cluster.models[0], cluster.sessions[0], cluster.weights(0)
    session.before_read()
    _no_first_row(model)
    session.before_forward()
    weight = model.get_parameter("0.weight")
    assert not weight[0].any() and torch.equal(weight[1:], before[0][1:])
    session.before_read()
    model.load_state_dict({name: torch.full_like(p, 3.0) for name, p in model.named_parameters()})
    session.before_forward()
    assert all((p == 3.0).all() for p in model.parameters())


def test_weights_that_are_swapped_through_data_around_an_evaluation_come_back_to_the_last_bit() -> None:
    """As averaging libraries do it: what is not noticed does no harm."""
    cluster = _mid_round()
    model, session, before = cluster.models[0], cluster.sessions[0], cluster.weights(0)
    for p in model.parameters():
        p.data.copy_(torch.full_like(p, 2.0))
    session.before_read()
    for p, kept in zip(model.parameters(), before):
        p.data.copy_(kept)
    session.before_forward()
    assert same(cluster.weights(0), before)


def test_an_evaluation_between_forward_and_backward_changes_no_gradient() -> None:
    cluster = _mid_round()
    model, session = cluster.models[0], cluster.sessions[0]
    gradients = []
    for reads in (False, True):
        session.before_forward()
        model.zero_grad()
        loss = model(torch.ones(2, 20)).square().sum()
        if reads:
            session.before_read()
        loss.backward()
        session.after_backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    assert same(*gradients)


def test_an_optimizer_of_some_of_the_parameters_that_steps_later_is_no_script_that_writes() -> None:
    cluster = Cluster("ef_signsgd")
    others = [torch.optim.SGD(model.parameters(), lr=0.01) for model in cluster.models]
    for _ in range(4):
        cluster.step()
        for session, other in zip(cluster.sessions, others):
            session.after_backward()
            other.step()
            session.other_stepped()
    assert not any(hook._edited for hook in cluster.hooks)


def test_a_script_that_writes_in_every_round_is_told_what_that_costs(caplog: pytest.LogCaptureFixture) -> None:
    cluster = Cluster("ef_signsgd", every=2)
    for _ in range(8):
        cluster.step(edit=_no_first_row)
    assert caplog.text.count("3 exchanges in a row averaged the weights without compression") == RANKS
    assert "'0.weight'" in caplog.text


def test_moments_travel_under_names_of_their_own() -> None:
    """Where operations find each other by name, two of one name in flight would be one too many."""
    cluster = Cluster("ef_signsgd", outer={"moments": "mean"})
    for _ in range(3):
        cluster.step()
    seen: list[str] = []
    for transport in (session.reducer.transport for session in cluster.sessions):
        original = transport.scoped
        transport.scoped = lambda name, original=original: (seen.append(name), original(name))[1]  # type: ignore[method-assign]
    cluster.step()
    mine = seen[: len(seen) // RANKS]
    assert len(mine) == len(set(mine)) == 3 * len(cluster.sessions[0].plan.buckets)


def test_scalars_and_counters_are_no_moments() -> None:
    scale = nn.Parameter(torch.tensor(1.0))
    optimizer = torch.optim.Adam([scale], lr=0.1)
    scale.grad = torch.tensor(1.0)
    optimizer.step()
    hook = LocalUpdates(Outer(moments="mean"), {"scale": scale}, _Names(["scale"]))  # type: ignore[arg-type]
    hook._anchors["scale"] = scale.detach().clone()
    assert sorted(hook._moments(optimizer)) == ["exp_avg", "exp_avg_sq"]


class _Names:
    def __init__(self, names: list[str]) -> None:
        self.names = lambda: names


def test_an_optimizer_that_is_sharded_is_refused() -> None:
    class ZeroRedundancyOptimizer(torch.optim.SGD):
        pass

    session = Cluster("ef_signsgd", ranks=1).sessions[0]
    with pytest.raises(UnsupportedError, match="use the optimizer inside of it, or set every to 1"):
        session.check_optimizer(ZeroRedundancyOptimizer(session.parameters.values(), lr=0.1))


def test_on_another_number_of_ranks_training_goes_on_from_what_was_agreed_on_and_meets_exactly() -> None:
    old = _mid_round()
    state = reshard([session.state_dict() for session in old.sessions])
    with old.sessions[0].exact():
        agreed = old.weights(0)
    new = Cluster("ef_signsgd", ranks=2)
    for model, session in zip(new.models, new.sessions):
        with torch.no_grad():
            for p, kept in zip(model.parameters(), agreed):
                p.copy_(kept)
        session.load_state_dict({**state, "size": 2})
    assert same(new.weights(0), agreed) and same(new.weights(1), agreed)
    ends: list[list[Tensor]] = []
    for _ in range(2):
        new.step(at_exchange=lambda hook: ends.append(own(hook)))
    torch.testing.assert_close(new.weights(0)[0], torch.stack([weights[0] for weights in ends]).mean(0))
