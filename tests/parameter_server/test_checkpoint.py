"""Checkpoints of the server: damaged ones are refused in one sentence, and a write that fails leaves the old one."""

from __future__ import annotations

import io
import os
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from compression_plugins.engine.saved import seal, write
from compression_plugins.errors import CompressionError, MismatchError
from compression_plugins.parameter_server import checkpoint
from compression_plugins.parameter_server.server import Server

from .world import options, problem, simulation

DAMAGED = int(os.environ.get("COMPRESSION_PLUGINS_FUZZ_CASES", "400"))


@pytest.fixture(scope="module")
def saved() -> bytes:
    """A file after two epochs of five."""
    states: list[dict[str, Any]] = []

    def keep(server: Server) -> None:
        if server.epoch == 2:
            states.append(server.state_dict())

    simulation(options(epochs=5), on_checkpoint=keep).run()
    buffer = io.BytesIO()
    torch.save(states[0], buffer)
    return buffer.getvalue()


def fresh() -> Server:
    task = problem()
    return Server(options(epochs=5), task.start(), task.samples)


def same(a: Server, b: Server) -> bool:
    x, y = a.state_dict(), b.state_dict()
    return x["checksum"] == y["checksum"]


def test_a_damaged_file_is_refused_in_one_sentence_or_gives_the_same_state(saved: bytes, tmp_path: Path) -> None:
    path, dice = tmp_path / "server.pt", random.Random(0)
    path.write_bytes(saved)
    whole = fresh()
    whole.load_state_dict(checkpoint.load(path))
    refused = 0
    for case in range(DAMAGED):
        data = bytearray(saved)
        how = case % 4
        if how == 0:
            data[dice.randrange(len(data))] ^= 1 << dice.randrange(8)
        elif how == 1:
            del data[dice.randrange(len(data)) :]
        elif how == 2:
            start = dice.randrange(len(data))
            data[start : start + dice.randrange(1, 64)] = dice.randbytes(dice.randrange(64))
        else:
            for _ in range(40):
                data[dice.randrange(len(data))] = dice.randrange(256)
        path.write_bytes(data)
        server = fresh()
        try:
            server.load_state_dict(checkpoint.load(path))
        except CompressionError as error:
            assert "\n" not in str(error) and len(str(error)) < 500
            refused += 1
            assert server.step == server.epoch == 0 and not server.history, "nothing of it is taken over"
        else:
            assert same(server, whole), f"case {case}: another state was accepted"
    assert refused > DAMAGED // 2


FORGED = [
    ("step", -1), ("step", 2**80), ("step", 1.5), ("step", "12"), ("epoch", 3.0), ("epoch", True), ("epoch", 4),
    ("tickets", 0), ("theta", 0.0), ("theta", float("nan")), ("theta", 2), ("digest", "x"), ("digest", None),
    ("traffic", {"snapshot_bits": 0}), ("traffic", []), ("history", []), ("history", None), ("history", [{}, {}]),
    ("x", None), ("x", torch.zeros(3)), ("x", torch.zeros(22).double()), ("x", torch.full((22,), torch.nan)),
    ("momentum", torch.full((22,), torch.inf)), ("momentum", [0.0] * 22), ("version", 1), ("version", "2"),
    ("more", 0), ("step", {1, 2}),
]  # fmt: skip


@pytest.mark.parametrize(("field", "value"), FORGED, ids=lambda value: str(value)[:12])
def test_every_field_has_bounds_even_where_the_checksum_fits(saved: bytes, field: str, value: Any) -> None:
    state = torch.load(io.BytesIO(saved), weights_only=True)
    state[field] = value
    del state["checksum"]
    server = fresh()
    with pytest.raises(CompressionError) as error:
        server.load_state_dict(seal(state) if not isinstance(value, set) else {**state, "checksum": ""})
    assert "\n" not in str(error.value)
    assert server.phase == "waiting" and server.step == 0


@pytest.mark.parametrize("what", [[], 3, None, {}, {"version": 2}])
def test_what_is_no_state_at_all_is_refused(what: Any) -> None:
    with pytest.raises(CompressionError):
        fresh().load_state_dict(what)


def test_a_checkpoint_of_another_run_is_told_apart_from_a_damaged_one(saved: bytes) -> None:
    task = problem()
    other = Server(options(epochs=5, lr=0.1), task.start(), task.samples)
    with pytest.raises(MismatchError, match="other options"):
        other.load_state_dict(torch.load(io.BytesIO(saved), weights_only=True))


def test_a_write_that_fails_leaves_the_old_file_and_no_other(
    saved: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "server.pt"
    path.write_bytes(saved)
    server = simulation(options()).run()

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CompressionError, match=r"cannot write .*: No space left on device"):
        write(server.state_dict(), path)
    assert path.read_bytes() == saved and list(tmp_path.iterdir()) == [path]
