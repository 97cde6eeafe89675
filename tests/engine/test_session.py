"""A session from start-up to state: its name, its patterns, its hooks in their order, and steps that did not happen."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from compression_plugins.config import Config
from compression_plugins.engine import patterns
from compression_plugins.engine import session as session_module
from compression_plugins.engine.session import Session
from compression_plugins.errors import ConfigError, UnsupportedError
from compression_plugins.optimizer.hooks import StepHook
from compression_plugins.schemes import registry
from compression_plugins.schemes.base import Scheme
from compression_plugins.schemes.topk import TopK
from compression_plugins.transports.echo import EchoTransport

from ..world import assert_same, config, written


class Recorder(StepHook):
    """A hook that counts its steps and writes down what it is told."""

    def __init__(self, names: list[str], seed: int) -> None:
        self.names, self.seed, self.steps, self.log = names, seed, 0, list[str]()

    def before_forward(self) -> None:
        self.log.append("before forward")

    def after_backward(self) -> None:
        self.log.append("after backward")

    def after_step(self, step: int, optimizer: torch.optim.Optimizer | None = None) -> None:
        self.log.append(f"after step {step}")
        self.steps += 1

    @contextmanager
    def exact(self) -> Iterator[None]:
        self.log.append("exact")
        yield
        self.log.append("inexact")

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        self.steps = saved.get("steps", 0)


class Hooked(TopK):
    """A toy scheme with a step hook."""

    name: ClassVar[str] = "hooked_topk"

    def step_hook(self, parameters: Mapping[str, Tensor], seed: int) -> StepHook | None:
        return Recorder(list(parameters), seed)


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process in which nothing has happened yet, and which knows the toy."""
    registry.names()
    monkeypatch.setitem(registry._SCHEMES, "hooked_topk", Hooked)
    monkeypatch.setattr(patterns, "_idle", {})
    session_module._uses.clear()


WEIGHTS = {"first.weight": torch.zeros(40, 30), "first.bias": torch.zeros(40), "second.weight": torch.zeros(30, 20)}


def opened(cfg: Config, parameters: Mapping[str, Tensor] = WEIGHTS, **keys: Any) -> Session:
    session = Session("host", cfg, parameters, **keys)
    session.start(EchoTransport(0, 2))
    session.make_hooks()
    session.opened()
    return session


def step(session: Session, seed: int, skipped: bool | None = False) -> list[Tensor]:
    """A step as a host makes it; None: its gradients are dropped."""
    session.before_forward()
    generator = torch.Generator().manual_seed(seed)
    works = [session.reducer.start(b, torch.randn(b.numel, generator=generator)) for b in session.plan.buckets]
    results = [work.result().clone() for work in works]
    session.after_backward()
    if skipped is None:
        session.drop()
    else:
        session.end_step(skipped)
    return results


def log(session: Session) -> list[str]:
    (hook,) = session.hooks
    assert isinstance(hook, Recorder)
    return hook.log


# --- names


def test_sessions_are_numbered_by_group_in_the_order_of_their_first_use() -> None:
    cfg = config("topk")
    a, unused, b = (Session("host", cfg, WEIGHTS) for _ in range(3))
    pair = Session("host", cfg, WEIGHTS, group="0.2")
    assert pair.name == "compression_plugins.0.2.0"
    assert b.name == "compression_plugins.all.0" == b.name
    assert a.name == "compression_plugins.all.1"
    assert unused.name == "compression_plugins.all.2", "those that are never used do not count"


# --- patterns

TYPO = {"exempt": ["frist.*"]}


def test_a_pattern_that_matches_nothing_is_told_for_each_model_by_the_rank_that_speaks(
    caplog: pytest.LogCaptureFixture,
) -> None:
    cfg = config("topk", **TYPO)
    Session("host", cfg, WEIGHTS, speaks=False)
    assert caplog.text == ""
    for model in range(2):
        Session("host", cfg, WEIGHTS)
        assert caplog.text.count("exempt pattern 'frist.*' matches none of the 3 tensors") == model + 1


def test_a_pattern_that_matches_in_no_model_stops_the_job_when_training_begins() -> None:
    with pytest.raises(ConfigError, match=r"'frist\.\*' matches none.*Correct it or remove it"):
        opened(config("topk", **TYPO))


def test_a_pattern_may_be_meant_for_another_model_of_the_job_or_for_what_is_frozen() -> None:
    cfg = config("topk", exempt=["first.*", "head.*"])
    one = Session("host", cfg, WEIGHTS)
    Session("host", cfg, {"head.weight": torch.zeros(30, 30)})
    one.start(EchoTransport(0, 2))
    one.opened()
    opened(config("topk", exempt=["cold.*"]), frozen=["cold.weight"])


def test_a_pattern_of_one_configuration_says_nothing_of_another() -> None:
    Session("host", config("topk", **TYPO), WEIGHTS)
    opened(config("topk"))


def test_what_is_no_real_floating_point_number_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="'table' is torch.int64"):
        Session("host", config("topk"), {"table": torch.zeros(3, dtype=torch.int64)})


# --- hooks


def test_hooks_get_the_parameters_that_their_scheme_averages_and_the_seed() -> None:
    session = opened(config("hooked_topk", seed=5))
    (hook,) = session.hooks
    assert (hook.names, hook.seed) == (["first.weight", "second.weight"], 5)


def test_hooks_are_called_around_forward_backward_and_step_in_that_order() -> None:
    session = opened(config("hooked_topk"))
    for seed in range(2):
        step(session, seed)
    once = ["before forward", "after backward"]
    assert log(session) == [*once, "after step 0", *once, "after step 1"]


@pytest.mark.parametrize("what", [True, None], ids=["skipped", "dropped"])
def test_a_step_that_does_not_happen_leaves_no_trace_in_memory_or_hooks(what: bool | None) -> None:
    straight, other = (opened(config("hooked_topk")) for _ in range(2))
    for seed in range(4):
        expected = step(straight, seed)
        before = other.state_dict()
        step(other, 90 + seed, skipped=what)
        assert_same(written(other.state_dict()), written(before))
        assert all(map(torch.equal, step(other, seed), expected))
        assert_same(other.state_dict()["hooks"][0], straight.state_dict()["hooks"][0])
    assert [line for line in log(other) if "step" in line] == [f"after step {n}" for n in range(4)]


def test_hooks_do_not_count_the_steps_of_the_dense_warm_up() -> None:
    session = opened(config("hooked_topk", warmup_steps=2))
    for seed in range(3):
        step(session, seed)
    assert [line for line in log(session) if "step" in line] == ["after step 2"]


def test_within_exact_every_hook_has_exact_parameters() -> None:
    session = opened(config("hooked_topk"))
    with session.exact():
        assert log(session) == ["exact"]
    assert log(session) == ["exact", "inexact"]


def test_a_state_has_the_hooks_and_one_without_them_begins_anew() -> None:
    first, second = (opened(config("hooked_topk")) for _ in range(2))
    for seed in range(3):
        step(first, seed)
    second.load_state_dict(first.state_dict())
    assert second.state_dict()["hooks"] == [{"steps": 3}]
    assert all(map(torch.equal, step(second, 7), step(first, 7)))
    second.load_state_dict({**first.state_dict(), "hooks": []})
    assert second.state_dict()["hooks"] == [{"steps": 0}]


# --- parameters that appear later


def test_parameters_that_appear_later_are_reduced_and_hooked_beside_the_first_ones(
    capsys: pytest.CaptureFixture[str],
) -> None:
    session = opened(config("hooked_topk"))
    step(session, 0)
    kept, before = session.plan.buckets, session.state_dict()["vectors"]
    capsys.readouterr()
    session.extend({"late.weight": torch.zeros(50, 20)})
    assert "new parameters, 1 tensors, 1,000 values" in capsys.readouterr().err
    assert session.plan.buckets[-len(kept) :] == kept and len(session.plan.buckets) == len(kept) + 1
    assert [hook.names for hook in session.hooks] == [["first.weight", "second.weight"], ["late.weight"]]
    assert_same(session.state_dict()["vectors"], before)
    step(session, 1)
    assert [hook.steps for hook in session.hooks] == [2, 1]
    assert "late.weight" in session.tensors()


def test_the_first_parameters_that_have_a_hook_may_be_those_that_appear_later() -> None:
    session = opened(config("hooked_topk", exempt=["first.*"]), {"first.weight": WEIGHTS["first.weight"]})
    assert session.hooks == []
    session.extend({"late.weight": torch.zeros(50, 20)})
    assert [hook.names for hook in session.hooks] == [["late.weight"]]


def test_a_host_that_makes_no_hooks_gets_none_later_either() -> None:
    session = Session("host", config("hooked_topk"), WEIGHTS)
    session.start(EchoTransport(0, 2))
    session.extend({"late.weight": torch.zeros(50, 20)})
    assert session.hooks == []


# --- the line at its end


def test_the_line_at_the_end_has_the_bytes_of_every_reducer(capsys: pytest.CaptureFixture[str]) -> None:
    """A host makes a new reducer when ranks come or go."""
    session = opened(config("topk", ratio=10.0))
    sent = 0.0
    for _ in range(2):
        for seed in range(2):
            step(session, seed)
        sent += session.reducer.transport.sent
        session.start(EchoTransport(0, 2))
    capsys.readouterr()
    session._tally.report()
    assert f"host: topk, 4 steps on 2 ranks: {sent / 4 / 1e6:.3f} MB sent per step" in capsys.readouterr().err


def test_a_session_is_a_scheme_away_from_its_reducer() -> None:
    session = Session("host", config("topk"), WEIGHTS)
    assert not session.started and issubclass(Hooked, Scheme)
    with pytest.raises(RuntimeError, match="no step has been reduced yet"):
        _ = session.reducer


@pytest.mark.parametrize(
    ("scheme", "optimizer", "every", "warns"),
    [
        ("scalecom", torch.optim.Adam, 1, True),
        ("marsit", torch.optim.AdamW, 1, True),
        ("scalecom", torch.optim.SGD, 1, False),
        ("scalecom", torch.optim.Adam, 4, False),
        ("qsgd", torch.optim.Adam, 1, False),
    ],
)
def test_a_scheme_that_misses_dense_accuracy_under_adam_says_so_once_with_the_presets_that_do_not(
    scheme: str, optimizer: Any, every: int, warns: bool, caplog: pytest.LogCaptureFixture
) -> None:
    chosen = Config.load({"scheme": scheme, "every": every})
    parameters = {name: torch.nn.Parameter(weight) for name, weight in WEIGHTS.items()}
    session = Session("host", chosen, parameters)
    for _ in range(2):
        session.check_optimizer(optimizer(parameters.values(), lr=0.1))
    said = caplog.text.count("transformer/small")
    assert said == (1 if warns else 0)
