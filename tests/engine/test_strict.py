"""What is looked at beside the reduction: gradients that are not finite, replicas, and bytes against the table."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from compression_plugins.config import Config
from compression_plugins.engine import replicas
from compression_plugins.engine.filling import Fillings
from compression_plugins.engine.health import NonFiniteError
from compression_plugins.engine.session import Session
from compression_plugins.errors import ConfigError, MismatchError
from compression_plugins.schemes import registry
from compression_plugins.schemes.topk import TopK

from ..ordered import OrderedTransport, OrderedWorld
from ..world import config

SHAPES = {"a.weight": (16, 20), "b.weight": (20, 8), "bias": (9,)}
SCHEMES = [name for name in registry.names() if registry.get(name).trains]


def parameters() -> dict[str, torch.Tensor]:
    return {name: torch.zeros(shape, requires_grad=True) for name, shape in SHAPES.items()}


def gradient(rank: int, step: int, name: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(100 * step + 10 * rank + len(name))
    return torch.randn(SHAPES[name], generator=generator)


def job(cfg: Config, size: int, ill: dict[int, tuple[int, str]], steps: int = 4, ordered: bool = True) -> list[Any]:
    """Each rank's session after `steps`, and what ended it early.

    Args:
        ill: step -> (rank, tensor) of a NaN.
    """

    def run(rank: int, transport: OrderedTransport) -> Any:
        session = Session("test", cfg, parameters(), speaks=rank == 0)
        session.start(transport)
        fillings = Fillings(session.plan, session.reducer)
        skipped = []
        for step in range(steps):
            for name in SHAPES:
                g = gradient(rank, step, name)
                if ill.get(step) == (rank, name):
                    g.view(-1)[3] = torch.nan
                fillings.give(name, g)
            try:
                fillings.collect()
            except NonFiniteError as error:
                return session, str(error)
            skipped.append(session.ill)
            session.end_step()
        return session, skipped

    return OrderedWorld(size, ordered=ordered).each(run)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_gradient_that_is_not_finite_ends_the_job_on_all_ranks_with_one_message(scheme: str) -> None:
    ordered = len(scheme) % 2 == 0  # both ways of transports, one for each scheme
    told = {text for _, text in job(config(scheme, on_nonfinite="raise"), 3, {1: (1, "b.weight")}, 2, ordered)}
    assert told == {"step 1: the gradient is not finite: 'b.weight' on rank 1 (on_nonfinite: raise)"}


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_step_with_a_gradient_that_is_not_finite_is_skipped_on_all_ranks(
    scheme: str, caplog: pytest.LogCaptureFixture
) -> None:
    found = job(config(scheme, on_nonfinite="skip"), 2, {1: (0, "a.weight"), 3: (1, "bias")})
    assert [skipped for _, skipped in found] == [[False, True, False, True]] * 2
    assert all(session.reducer.step == 2 for session, _ in found), "a skipped step does not count"
    said = caplog.text
    assert "step 1: the gradient is not finite: 'a.weight' on rank 0; the step is skipped, 1 of them" in said


def test_without_the_key_it_passes_as_it_does_in_the_host() -> None:
    assert [skipped for _, skipped in job(config("topk"), 2, {1: (0, "a.weight")})] == [[False] * 4] * 2


def test_local_steps_and_on_nonfinite_are_refused_together() -> None:
    with pytest.raises(ConfigError, match="leave it at pass, or set every to 1"):
        Config.load({"scheme": "topk", "every": 4, "on_nonfinite": "skip"})


def replica(differs: dict[int, str], **keys: Any) -> list[str]:
    """What each rank's session says when parameters differ from the second step on."""

    def run(rank: int, transport: OrderedTransport) -> str:
        named = parameters()
        session = Session("test", config("topk", **keys), named, speaks=rank == 0)
        session.start(transport)
        for step in range(4):
            if step == 1 and rank in differs:
                with torch.no_grad():
                    named[differs[rank]].view(-1)[-1] += 2.0**-149  # one bit of the smallest kind
            try:
                session.end_step()
            except MismatchError as error:
                return f"{step}: {error}"
        return "equal"

    return OrderedWorld(3).each(run)


def test_parameters_that_differ_are_found_on_all_ranks_at_the_next_comparison() -> None:
    assert replica({}, check_every=2) == ["equal"] * 3
    told = replica({2: "b.weight"}, check_every=2)
    assert len(set(told)) == 1
    assert told[0].startswith(
        "1: after step 2 parameter 'b.weight' of rank 2 differs from that of rank 0 (check_every)"
    )
    assert "the machines are alike" in told[0]
    assert replica({2: "b.weight"}, check_every=3)[0].startswith("2: after step 3"), "not earlier"
    assert "parameter 'a.weight' of ranks 1, 2" in replica({1: "a.weight", 2: "a.weight"}, check_every=1)[0]
    assert replica({1: "bias"}) == ["equal"] * 3, "nobody looks without the key"


def test_ranks_on_other_machines_are_told_that_these_may_be_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = iter(range(100))
    monkeypatch.setattr(replicas, "_machine", lambda: next(numbers))
    assert "use equal machines" in replica({1: "bias", 2: "bias"}, check_every=4)[0]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_what_was_sent_is_what_the_table_had_promised(scheme: str) -> None:
    for session, _ in job(config(scheme, warmup_steps=1, bucket_mb=0.001), 3, {}, steps=5):
        assert session.reducer.ledger.steps, "a whole period is over"
        assert session.reducer.ledger.report(1) == ""


def test_bytes_that_the_table_had_not_promised_are_named_at_the_end(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    original = TopK.wire_bits
    monkeypatch.setattr(TopK, "wire_bits", lambda self, *a: 0.5 * original(self, *a))
    sessions = [session for session, _ in job(config("topk", bucket_mb=0.0015), 2, {})]
    caplog.clear()
    sessions[0]._tally.report()
    said = caplog.text
    assert "warning: test: 0.000 MB were sent per step and rank where the table had promised 0.000 MB" in said
    assert "the bucket of 'a.weight' (1 tensors, topk)" in said and "bias" not in said
    caplog.clear()
    sessions[1]._tally.report()
    assert not caplog.text, "one rank speaks"


def test_a_bucket_that_is_reduced_twice_in_a_step_is_named_with_the_number() -> None:
    def run(rank: int, transport: OrderedTransport) -> str:
        session = Session("test", config("topk"), parameters())
        session.start(transport)
        fillings = Fillings(session.plan, session.reducer)
        for step in range(4):
            for _ in range(2):
                for name in SHAPES:
                    fillings.give(name, gradient(rank, step, name))
                fillings.collect()
            session.end_step()
        return session.reducer.ledger.report(1)

    for told in OrderedWorld(2).each(run):
        assert "reduced 2 times in a step" in told
