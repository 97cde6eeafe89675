"""Marsit's own laws: merged bits are fair draws, memory is conserved, flushes are exact, forms and refusals."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from compression_plugins.collectives import square_rows
from compression_plugins.config import Config
from compression_plugins.engine.reducer import Reducer
from compression_plugins.engine.saved import STATE_VERSION
from compression_plugins.errors import ConfigError, UnsupportedError
from compression_plugins.transports.local import LocalWorld, drive

from ..world import World, config, mean

FORMS = [
    *[pytest.param({"form": form}, n, id=f"{form}-{n}") for form in ("one_hot", "ring") for n in (2, 4, 6, 8)],
    *[
        pytest.param({"form": "torus", "rows": rows}, n, id=f"torus-{rows}x{n // rows}")
        for n, rows in ((4, 2), (6, 2), (6, 3), (8, 2))
    ],
]
NEVER = 10**6  # flush_steps of a world that is past its first flush


def votes(world: World, gradients: list[Tensor], draws: int) -> Tensor:
    """Merged signs of `gradients`, one row a step, from empty memories: bool [draws, numel]."""
    rows = []
    for step in range(1, draws + 1):
        for reducer in world.reducers:
            reducer.load_state_dict(
                {"version": STATE_VERSION, "step": step, "size": world.size, "vectors": {}, "tensors": {}}
            )
        rows.append(world.reduce(gradients)[0] > 0)
    return torch.stack(rows)


@pytest.mark.parametrize(("form", "size"), FORMS)
def test_a_merged_bit_is_every_ranks_sign_with_probability_one_nth(form: dict, size: int) -> None:
    """All 2^n patterns of the ranks' signs, each at many coordinates and steps."""
    repeats, draws = 2 ** (14 - size), 8
    world = World(config("marsit", flush_steps=NEVER, eta_s=1.0, **form), size, {"w": (2**size, repeats)})
    pattern = torch.arange(2**size).repeat_interleave(repeats)
    signs = [(pattern >> rank) & 1 for rank in range(size)]
    drawn = votes(world, [2.0 * sign - 1 for sign in signs], draws).double()

    expected = torch.stack(signs).double().mean(0)
    unanimous = (expected == 0) | (expected == 1)
    assert torch.equal(drawn[:, unanimous], expected[unanimous].expand(draws, -1)), "bits that agree stay"
    counts = drawn.mean(0).view(2**size, repeats).mean(1)[1:-1]
    wanted = expected.view(2**size, repeats).mean(1)[1:-1]
    z = (counts - wanted) / (wanted * (1 - wanted) / (repeats * draws)).sqrt()
    # Independent draws make z standard normal; bits that shared a random number would widen it.
    assert z.square().mean() == pytest.approx(1, abs=6 * (2 / len(z)) ** 0.5)
    assert z.abs().max() < 5
    for sign in signs:  # the regression of the merged bit on this rank's sign
        weight = drawn[:, sign == 1].mean() - drawn[:, sign == 0].mean()
        assert weight == pytest.approx(1 / size, abs=5 / (drawn.numel()) ** 0.5)


@pytest.mark.parametrize("shape", [(37, 50), (1, 1), (1, 37)])
@pytest.mark.parametrize(("form", "size"), FORMS)
def test_weights_less_the_mean_memory_descend_by_the_mean_gradient(form: dict, size: int, shape: tuple) -> None:
    """y = x - mean c obeys y <- y - mean g at every step, one-bit steps and flushes alike, whatever was drawn."""
    rules = [{"match": "w", "scheme": "marsit"}]
    world = World(config("marsit", flush_steps=4, rules=rules, **form), size, {"w": shape})
    x = torch.zeros(world.bucket.numel, dtype=torch.float64)
    virtual = x.clone()
    for step in range(9):
        gradients = world.gradients(step)
        results = world.step(gradients)
        assert all(torch.equal(result, results[0]) for result in results)
        x -= results[0]
        virtual -= mean(gradients)
        torch.testing.assert_close(x - world.memory(), virtual, rtol=0, atol=2e-5)
        assert world.memory().any() == (step % 4 != 0), "a flush empties the memory"


def test_no_lane_beyond_the_end_reaches_the_memory() -> None:
    """33 elements on 4 ranks: 95 lanes of padding. The memory is p - update, exactly, and no longer than p."""
    world = World(
        config("marsit", flush_steps=NEVER, eta_s=0.5, form="torus", rules=[{"match": "*"}]), 4, {"w": (3, 11)}
    )
    world.step(world.gradients(0))
    gradients = world.gradients(1)
    result = world.step(gradients)[0]
    for gradient, reducer in zip(gradients, world.reducers):
        residual = reducer.state.kept(world.bucket)
        assert residual.shape == (33,) and torch.equal(residual, gradient - result)
    assert torch.equal(result.abs(), torch.full((33,), 0.5))


@pytest.mark.parametrize(("form", "size"), FORMS)
def test_flushing_every_step_is_the_dense_average_bit_for_bit(form: dict, size: int) -> None:
    world, dense = World(config("marsit", flush_steps=1, **form), size), World(config("none"), size)
    for step in range(3):
        assert torch.equal(world.step(world.gradients(step))[0], dense.step(dense.gradients(step))[0])
    assert world.local.transports[0].sent == dense.local.transports[0].sent
    assert world.reducers[0].state.nbytes() == 0


@pytest.mark.parametrize("size", [2, 3, 5, 7])
def test_on_a_prime_number_of_ranks_the_torus_is_the_ring(size: int) -> None:
    forms: list[dict] = [{"form": "ring"}, {"form": "torus"}, {"form": "torus", "rows": size}]
    worlds = [World(config("marsit", **form), size) for form in forms]
    assert square_rows(size) == 1
    for step in range(5):
        ring, *tori = [world.step(world.gradients(step))[0] for world in worlds]
        assert all(torch.equal(torus, ring) for torus in tori)


@pytest.mark.parametrize(("size", "rows"), [(1, 1), (4, 2), (6, 2), (12, 3), (16, 4), (64, 8), (30, 5)])
def test_auto_is_the_torus_nearest_to_a_square(size: int, rows: int) -> None:
    assert square_rows(size) == rows


@pytest.mark.parametrize(("form", "size"), FORMS)
def test_all_forms_send_two_bits_an_element_times_n_minus_one_nth(form: dict, size: int) -> None:
    world = World(config("marsit", flush_steps=NEVER, eta_s=1.0, **form), size, {"w": (48, 64)})  # no padding for any n
    votes(world, world.gradients(0), 1)
    around, marks = (size - 1) / size, (size - 1) * 64  # a bit for each of 48 rows, in whole words
    expected = 2 * around * (48 * 64 + 32) + marks  # and the flag's word
    for transport in world.local.transports:
        assert 8 * transport.sent == pytest.approx(expected, rel=1e-12)
    assert 8 * world.bucket.wire_bytes(size) == pytest.approx(expected, rel=1e-3)  # one flush in a million steps


def test_a_torus_needs_fewer_hops_than_the_ring() -> None:
    def operations(**form: str) -> int:
        world = World(config("marsit", flush_steps=NEVER, eta_s=1.0, **form), 8)
        world.step(world.gradients(0))
        jobs = [reducer.start(world.bucket, world.gradients(1)[0]) for reducer in world.reducers]
        drive(jobs)
        return jobs[0].phase

    beside = 2  # the flag, and the marks of zeros
    assert operations(form="ring") == beside + 2 * 7
    assert operations(form="torus") == beside + 2 * 3 + 2 * 1


@pytest.mark.parametrize(
    ("size", "rows", "nearest", "valid"), [(6, 4, 3, "1, 2, 3, 6"), (5, 2, 1, "1, 5"), (8, 16, 8, "1, 2, 4, 8")]
)
def test_rows_that_do_not_divide_the_ranks_are_refused_at_start_up(
    size: int, rows: int, nearest: int, valid: str
) -> None:
    cfg = Config.load({"scheme": "none", "rules": [{"match": "*", "scheme": "marsit", "form": "torus", "rows": rows}]})
    with pytest.raises(UnsupportedError, match=rf"rows: {rows} .* {size} ranks.* rows: {nearest} \(valid: {valid}"):
        Reducer(cfg, LocalWorld(size).transports[0])


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"rows": 2}, "only form: torus has it, not form: one_hot"),
        ({"rows": 2, "form": "ring"}, "only form: torus has it, not form: ring"),
        ({"rows": 0, "form": "torus"}, "greater than or equal to 1"),
    ],
)
def test_keys_that_would_have_no_effect_are_refused(keys: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Config.load({"scheme": "marsit", **keys})


def test_the_first_compressed_step_is_a_flush_wherever_the_warm_up_ends() -> None:
    """Else `eta_s: auto` would not be known, and nothing would move, until the next multiple of `flush_steps`."""
    world = World(config("marsit", warmup_steps=3, flush_steps=100), 2)
    for step in range(6):
        gradients = world.gradients(step)
        result = world.step(gradients)[0]
        if step <= 3:
            torch.testing.assert_close(result.double(), mean(gradients))
        assert result.all(), "every element moves"


# --- eta_s: auto

AUTO = [{"form": "one_hot"}, {"form": "ring"}, {"form": "torus"}]


def late(world: World, begin: int, rounds: int) -> list[tuple[Tensor, Tensor]]:
    """(First tensor of the bucket, second) of every result, where the first has no gradient before round `begin`."""
    numel, found = world.bucket.segments[0].numel, []
    for step in range(rounds):
        gradients = world.gradients(step)
        for gradient in gradients:
            if step < begin:
                gradient[:numel] = 0
            gradient[numel:] *= 100
        found.append(world.step(gradients)[0].split([numel, world.bucket.numel - numel]))
    return found


@pytest.mark.parametrize("form", AUTO, ids=lambda form: form["form"])
@pytest.mark.parametrize(("begin", "known"), [(1, 1), (2, 2), (3, 4), (5, 8), (9, 16)])
def test_a_tensor_that_was_zero_at_the_flush_gets_its_scale_soon_and_the_others_keep_theirs(
    form: dict, begin: int, known: int
) -> None:
    """At rounds 1, 2, 4 and every eighth: the ranks' mean |p|, memory included."""
    world = World(config("marsit", flush_steps=100, **form), 3)
    results = late(world, begin, known + 1)
    assert not any(early.any() for early, _ in results[:known]), "it has no scale yet"
    (new, _), (_, flushed) = results[known], results[0]
    assert (new != 0).all() and new.abs().unique().numel() == 1
    waited = [sum(world.gradients(step)[rank] for step in range(begin, known + 1)) for rank in range(3)]
    expected = torch.stack([p[: new.numel()] for p in waited]).abs().mean()
    torch.testing.assert_close(new.abs().mean(), expected)
    scales = {float(other.abs().mean()) for _, other in results[1:]}
    assert len(scales) == 1 and scales.pop() == pytest.approx(
        float(torch.stack([g[new.numel() :] for g in world.gradients(0)]).abs().mean()) * 100, rel=1e-5
    )
    assert flushed.abs().unique().numel() > 1000, "the flush is exact"


@pytest.mark.parametrize("form", AUTO, ids=lambda form: form["form"])
@pytest.mark.parametrize("flush_steps", [2, 3, 6, 9, 18])
def test_wire_bits_count_the_messages_of_late_scales(form: dict, flush_steps: int) -> None:
    """A mean of each tensor at rounds 1, 2, 4, 8, 16 after the flush; none where the scale is given."""
    sent = {}
    for eta in ("auto", 0.5):
        world = World(config("marsit", flush_steps=flush_steps, eta_s=eta, **form), 3)
        for step in range(flush_steps):
            world.step(world.gradients(step))
        sent[eta] = sum(transport.sent for transport in world.local.transports) / 3
        assert sent[eta] / flush_steps == pytest.approx(world.bucket.wire_bytes(3), rel=1e-9)
    messages = sum(at < flush_steps for at in (1, 2, 4, 8, 16))
    assert sent["auto"] - sent[0.5] == pytest.approx(messages * 2 * 2 / 3 * 4 * 2)
