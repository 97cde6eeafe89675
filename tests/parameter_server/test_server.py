"""The server: bounded delay, determinism, workers that come and go, checkpoints."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compression_plugins.errors import CompressionError, MismatchError
from compression_plugins.parameter_server import messages
from compression_plugins.parameter_server.messages import Kind, MessageError
from compression_plugins.parameter_server.server import Server
from compression_plugins.parameter_server.simulate import Simulation

from .world import options, simulation


def start(run: Simulation) -> Simulation:
    for rank in sorted(run.workers):
        run.server.join(rank)
    run.server.begin()
    return run


@settings(max_examples=25, deadline=None)
@given(workers=st.integers(1, 6), tau=st.integers(0, 7), seed=st.integers(0, 10**6), leave=st.floats(0, 0.05))
def test_no_delay_exceeds_tau_and_no_step_is_lost_whatever_the_order(
    workers: int, tau: int, seed: int, leave: float
) -> None:
    run = start(simulation(options(method="asyfpg", workers=workers, tau=tau, inner_steps=15, epochs=2)))
    server, dice = run.server, random.Random(seed)
    while server.phase != "done":
        run._deliver()
        ready = [rank for rank in run._answers if run._answers[rank]]
        assert ready, "somebody can always go on"
        rank = dice.choice(ready)
        if dice.random() < leave:
            run.lose(rank)
            server.join(rank)
        else:
            server.receive(rank, run._answers[rank].popleft())
    assert len(server.delays) == 30 == server.step
    assert max(server.delays) <= tau
    assert all(len(parts) == 1 for parts in server.parts.values())


def test_a_constant_delay_is_realised() -> None:
    server = simulation(options(workers=3, tau=2, inner_steps=30, epochs=1), delays=[2]).run()
    assert server.delays[:2] == [0, 1] and set(server.delays[2:-2]) == {2}


def test_asked_for_delays_are_realised_where_they_can_be() -> None:
    asked = [0, 1, 2, 0, 0, 1, 0, 2, 0, 0]
    server = simulation(options(workers=3, tau=4, inner_steps=10, epochs=1), delays=asked).run()
    assert server.delays[:4] == [0, 1, 2, 0]


def test_an_early_gradient_is_held_until_the_late_one_has_arrived() -> None:
    run = start(simulation(options(workers=2, tau=2, inner_steps=20, epochs=1)))
    server = run.server
    while server.phase == "snapshot":
        run.advance()
    run._deliver()
    for expected in (1, 2, 2):  # worker 1 runs ahead of worker 0, which holds x_0: its third gradient has to wait
        server.receive(1, run._answers[1].popleft())
        run._deliver()
        assert server.step == expected
    assert server.blockers() == [0] and server.staleness() == {0: 2}
    server.receive(0, run._answers[0].popleft())
    assert server.delays == [0, 0, 2, 1] and server.blockers() == []


def test_nobody_blocks_while_everybody_computes() -> None:
    run = start(simulation(options(workers=3, tau=8, inner_steps=20, epochs=1)))
    assert run.server.blockers() == []
    run.advance()
    assert run.server.blockers() == [1, 2], "one sum has arrived; its worker waits for the other two"


@pytest.mark.parametrize("method", ["asylpg", "sparse_asylpg", "acc_asylpg", "qsvrg"])
def test_equal_delays_give_equal_bits_and_others_do_not(method: str) -> None:
    def final(**changes: Any) -> torch.Tensor:
        delays = changes.pop("delays", [2, 0, 1])
        return simulation(options(method=method, **changes), delays=delays).run().state.snapshot

    assert torch.equal(final(), final())
    assert not torch.equal(final(), final(delays=[0]))
    assert not torch.equal(final(), final(seed=4))


def test_a_recorded_order_of_arrivals_replays_bit_for_bit() -> None:
    first = simulation(options(), delays=[3, 0, 2, 1, 1]).run()
    again = simulation(options(), arrivals=first.arrivals).run()
    assert torch.equal(first.state.snapshot, again.state.snapshot) and first.delays == again.delays


@pytest.mark.parametrize("method", ["asylpg", "acc_asylpg"])
def test_a_resumed_run_ends_with_the_same_bits(method: str, tmp_path: Any) -> None:
    chosen, path = options(method=method, epochs=5), tmp_path / "server.pt"

    def save(server: Server) -> None:
        if server.epoch == 2:
            torch.save(server.state_dict(), path)

    whole = simulation(chosen, delays=[1, 2, 0], on_checkpoint=save).run()
    resumed = simulation(chosen, delays=[1, 2, 0])
    resumed.server.load_state_dict(torch.load(path, weights_only=True))
    server = resumed.run()
    assert torch.equal(server.state.snapshot, whole.state.snapshot)
    for run in (whole, server):  # the shards are announced once more, which only the bytes on the wire show
        run.traffic.wire_bytes = 0
        run.history = [replace(row, wire_bytes=0) for row in run.history]
    assert server.history == whole.history and server.traffic == whole.traffic


def test_a_checkpoint_of_other_options_or_of_a_finished_run_is_refused() -> None:
    done = simulation(options()).run()
    saved = done.state_dict()
    with pytest.raises(MismatchError, match="other options"):
        simulation(options(lr=0.1)).server.load_state_dict(saved)
    with pytest.raises(CompressionError, match="raise epochs"):
        simulation(options()).server.load_state_dict(saved)
    longer = simulation(options(epochs=4))
    longer.server.load_state_dict(saved)
    assert longer.run().epoch == 4


@pytest.mark.parametrize("when", ["snapshot", "inner"])
def test_a_lost_worker_s_shard_is_reassigned_and_comes_back_with_it(when: str) -> None:
    run = start(simulation(options(workers=3, inner_steps=20, epochs=3, method="asyfpg")))
    server = run.server
    while not (server.phase == when and server.epoch == 1):
        run.advance()
    run._deliver()
    run.lose(1)
    assert server.parts == {0: [0, 1], 2: [2]}
    while server.epoch < 2:
        run.advance()
    server.join(1)
    assert server.parts == {0: [0], 1: [1], 2: [2]}
    while run.advance():
        pass
    assert server.step == 60 and len(server.history) == 3
    undisturbed = simulation(options(workers=3, inner_steps=20, epochs=3, method="asyfpg")).run()
    assert server.history[1].gradient_norm == pytest.approx(undisturbed.history[1].gradient_norm, rel=1e-5), (
        "the full gradient is over all samples, whoever summed them"
    )


def test_a_run_survives_the_loss_of_everybody() -> None:
    run = start(simulation(options(workers=2, tau=3)))
    server = run.server
    for _ in range(9):
        run.advance()
    for rank in (0, 1):
        run.lose(rank)
    assert not server.active and not run.advance()
    server.join(1)
    assert server.parts == {1: [0, 1]}
    while run.advance():
        pass
    assert server.phase == "done" and len(server.history) == 3


def test_what_was_not_asked_for_is_refused_and_changes_nothing() -> None:
    run = start(simulation(options()))
    server = run.server
    total = messages.exact(Kind.TOTAL, torch.ones(server.numel), 0, count=29, value=1.0)
    gradient = messages.nothing(Kind.GRADIENT, 0)
    with pytest.raises(MessageError, match="not those of parts"):
        server.receive(0, total)
    with pytest.raises(MessageError, match="not asked for"):
        server.receive(0, gradient)
    while server.phase == "snapshot":
        run.advance()
    before = server.state.x.clone()
    with pytest.raises(MessageError, match="not asked for"):
        server.receive(0, total)
    with pytest.raises(MessageError, match=r"ticket 7\)"):
        server.receive(0, messages.nothing(Kind.GRADIENT, 7))
    assert torch.equal(before, server.state.x) and server.step == 0


@pytest.mark.parametrize("method", ["asyfpg", "asylpg"])
def test_a_diverging_run_says_so(method: str) -> None:
    with pytest.raises(CompressionError, match="lower"):
        simulation(options(lr=1e32, method=method)).run()


def test_the_run_stops_at_the_target_loss() -> None:
    server = simulation(options(epochs=50, target_loss=0.3)).run()
    assert server.history[-1].loss <= 0.3 < server.history[-2].loss
    assert len(server.history) < 50


def test_more_workers_than_samples_are_refused() -> None:
    with pytest.raises(CompressionError, match="91 workers for 90 samples"):
        simulation(options(workers=91))
