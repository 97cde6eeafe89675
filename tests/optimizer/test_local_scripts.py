"""Local updates under scripts that read, write, evaluate and save in the middle of a round."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from compression_plugins.engine.state import reshard
from compression_plugins.errors import UnsupportedError
from compression_plugins.optimizer.local_updates import LocalUpdates, Outer

from .replicas import RANKS, Cluster, no_first_row, own, same


def _mid_round(scheme: str = "ef_signsgd", **settings: Any) -> Cluster:
    cluster = Cluster(scheme, **settings)
    for _ in range(6):
        cluster.step()
    return cluster


def test_what_a_script_writes_while_the_anchor_is_shown_stays_and_the_rest_comes_back() -> None:
    cluster = _mid_round()
    model, session, before = cluster.models[0], cluster.sessions[0], cluster.weights(0)
    session.before_read()
    no_first_row(model)
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
        cluster.step(edit=no_first_row)
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
