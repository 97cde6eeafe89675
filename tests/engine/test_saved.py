"""Saved state is whole and true, or refused in one sentence before anything of it is loaded."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch

from compression_plugins.engine import saved
from compression_plugins.engine.saved import Folder, checksum, own, seal
from compression_plugins.engine.session import Session
from compression_plugins.errors import CompressionError
from compression_plugins.transports.local import LocalWorld

from ..world import World, config, mean

LENGTHS = {"first.weight": 37 * 50, "second.weight": 30 * 41}


def states(name: str = "scalecom", size: int = 2, steps: int = 3) -> list[dict[str, Any]]:
    """What sessions of `size` ranks have saved after some steps."""
    world = World(config(name), size)
    for step in range(steps):
        world.step(world.gradients(step))
    parts = {"config": config(name).to_dict(), "hooks": []}
    return [seal({**r.state_dict(), "rank": rank, **parts}) for rank, r in enumerate(world.reducers)]


def refused(state: Any, rank: int = 0, size: int = 2) -> str:
    with pytest.raises(CompressionError) as caught:
        own(state, rank, size, LENGTHS)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600
    return str(caught.value)


def test_a_state_is_its_ranks_own() -> None:
    both = states()
    assert own(both[1], 1, 2, LENGTHS) is both[1]
    assert own(both, 1, 2, LENGTHS) is both[1]
    assert own([both[1]], 1, 2, LENGTHS) is both[1]
    assert own({}, 1, 2, LENGTHS) == {}
    assert "of rank 1 of 2, here is rank 0 of 2; give a list" in refused(both[1])
    assert "of rank 0 of 2, here is rank 0 of 3; give a list" in refused(both[0], size=3)
    assert "not those of all ranks at one step" in refused(both[::-1])
    assert "not those of all ranks at one step" in refused([both[0], states(steps=4)[1]])


@pytest.mark.parametrize("key", ["step", "rank", "size", "config", "vectors", "tensors", "hooks"])
def test_a_missing_key_is_named(key: str) -> None:
    state = states()[0]
    del state[key]
    assert f"{key} is missing" in refused(state)


def test_another_version_another_kind_and_another_model_are_told() -> None:
    state = states()[0]
    assert "of version 2 is unknown" in refused({**state, "version": 2})
    assert "is a mapping, or a list of all ranks'" in refused("state.pt")
    assert "is a mapping, not 3" in refused([3])
    with pytest.raises(CompressionError, match="'first.weight' has 7 elements here, and residual .* 1850"):
        own(state, 0, 2, {**LENGTHS, "first.weight": 7})


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_memory_that_is_not_finite_is_refused_even_with_a_checksum(wrong: float) -> None:
    state = states()[0]
    state["vectors"]["residual"]["second.weight"][0][3] = wrong
    assert "checksum does not fit" in refused(state)
    assert "residual of 'second.weight' in this compression state holds NaN or infinity" in refused(seal(state))


def test_every_change_of_the_contents_changes_the_checksum() -> None:
    state = states()[0]
    residual = state["vectors"]["residual"]["first.weight"]
    before = checksum(state)
    for change in (
        {"step": 4},
        {"vectors": {}},
        {"vectors": {"residual": {"first.weight": {1: residual[0]}}}},
        {"vectors": {"residual": {"first.weight": {0: residual[0].double()}}}},
        {"vectors": {"residual": {"first.weight": {0: residual[0].view(37, 50)}}}},
        {"step": "3"},
        {"more": None},
    ):
        assert checksum({**state, **change}) != before
    for place in range(0, 1850, 97):
        flipped = residual[0].clone()
        flipped.view(torch.int32)[place] ^= 1
        vectors = {"residual": {**state["vectors"]["residual"], "first.weight": {0: flipped}}}
        assert checksum({**state, "vectors": vectors}) != before
    assert checksum(dict(reversed(state.items()))) == before


def test_a_damaged_file_is_refused_or_holds_what_was_written(tmp_path: Path) -> None:
    """100 files with flipped bytes, and 20 that end too early."""
    state, path, draw = states()[0], tmp_path / "s.pt", random.Random(0)
    saved.write(state, path)
    content = path.read_bytes()
    refusals = 0
    for i in range(120):
        if i < 100:
            damaged = bytearray(content)
            for _ in range(draw.choice((1, 1, 400))):
                damaged[draw.randrange(len(damaged))] ^= 1 << draw.randrange(8)
        else:
            damaged = bytearray(content[: draw.randrange(len(content))])
        path.write_bytes(damaged)
        try:
            found = own(saved.read(path), 0, 2, LENGTHS)
            assert checksum(found) == state["checksum"]  # in bytes that say nothing
        except CompressionError as error:
            refusals += 1
            assert "\n" not in str(error) and len(str(error)) < 600
    assert refusals > 60


def test_a_full_disk_leaves_the_old_file_whole_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "s.pt"
    old, new = states(steps=2)[0], states(steps=3)[0]
    saved.write(old, path)
    (tmp_path / "s.pt.partial").symlink_to("/dev/full")
    with pytest.raises(CompressionError, match=r"cannot write .*s\.pt: No space left on device; what") as caught:
        saved.write(new, path)
    assert "\n" not in str(caught.value)
    assert saved.read(path)["checksum"] == old["checksum"]
    assert [entry.name for entry in tmp_path.iterdir()] == ["s.pt"]
    saved.write(new, path)
    assert saved.read(path)["checksum"] == new["checksum"]
    assert [entry.name for entry in tmp_path.iterdir()] == ["s.pt"]


def test_a_job_that_dies_while_it_writes_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old, new, path = states(steps=2)[0], states(steps=3)[0], tmp_path / "s.pt"
    saved.write(old, path)

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(saved.os, "replace", killed)
        saved.write(new, path)
    assert saved.read(path)["checksum"] == old["checksum"]
    saved.write(new, path)  # over what the dead one has left
    assert saved.read(path)["checksum"] == new["checksum"] and len(list(tmp_path.iterdir())) == 1


def test_files_of_another_number_of_ranks_are_read_together_and_removed_by_the_next_save(tmp_path: Path) -> None:
    folder, four = Folder(tmp_path / "deep" / "er"), states(size=4)
    assert folder.empty() and folder.read(0, 2) == []
    for rank, state in enumerate(four):
        folder.write(state, rank, 4, sweep=rank == 0)
    assert [document["rank"] for document in folder.read(1, 2)] == [0, 1, 2, 3]
    assert [document["rank"] for document in folder.read(3, 4)] == [3]
    (folder.path / "compression_rank_00002_of_00004.pt").rename(tmp_path / "elsewhere")
    with pytest.raises(CompressionError, match="of 4 ranks, but not of ranks 2; to continue on 2 ranks copy"):
        folder.read(0, 2)
    folder.write(states(size=3)[0], 0, 3, sweep=False)
    with pytest.raises(CompressionError, match="of 3 and 4 ranks, but none of rank 1 of 2; delete"):
        folder.read(1, 2)
    for rank, state in enumerate(states()):
        folder.write(state, rank, 2, sweep=rank == 0)
    assert sorted(path.name for path in folder.path.iterdir()) == [
        f"compression_rank_0000{rank}_of_00002.pt" for rank in range(2)
    ]


@pytest.mark.parametrize("name", ["topk", "powersgd", "ef_signsgd"])
def test_from_four_ranks_to_two_to_three_the_same_is_owed(name: str, tmp_path: Path) -> None:
    world, owed = World(config(name), 4), None
    for step in range(4):
        world.step(world.gradients(step))
    for size in (2, 3):
        owed, parts = world.memory(), {"config": config(name).to_dict(), "hooks": []}
        assert owed.norm() > 0
        for rank, reducer in enumerate(world.reducers):
            state = seal({**reducer.state_dict(), "rank": rank, **parts})
            Folder(tmp_path).write(state, rank, world.size, sweep=rank == 0)
        world = World(config(name), size)
        for rank, reducer in enumerate(world.reducers):
            reducer.load_state_dict(own(Folder(tmp_path).read(rank, size), rank, size, LENGTHS))
        torch.testing.assert_close(world.memory(), owed, rtol=0, atol=1e-6)
        gradients = world.gradients(size)  # and what it sends next is taken from it
        applied = world.step(gradients)[0].double()
        torch.testing.assert_close(applied + world.memory(), mean(gradients) + owed, rtol=0, atol=2e-5)


def test_torch_distributed_checkpoint_saves_and_loads_it(tmp_path: Path) -> None:
    checkpoint = pytest.importorskip("torch.distributed.checkpoint")
    state = states()[1]
    checkpoint.save({"compression": {"rank1": saved.packed(state)}}, checkpoint_id=tmp_path, no_dist=True)
    template = {"compression": {"rank1": saved.packed({})}}
    checkpoint.load(template, checkpoint_id=tmp_path, no_dist=True)
    assert own(saved.unpacked(template["compression"]["rank1"]), 1, 2, LENGTHS)["checksum"] == state["checksum"]


def test_a_session_judges_before_it_loads_and_forgets_what_another_scheme_remembers(
    capsys: pytest.CaptureFixture[str],
) -> None:
    def session(name: str) -> Session:
        made = Session("host", config(name), {key: torch.zeros(n, 1) for key, n in LENGTHS.items()})
        made.start(LocalWorld(2).transports[0])
        return made

    first = session("scalecom")
    state = states()[0]
    judged = first.judge(lambda: state, 0, 2)
    assert judged.standing.startswith("of step 3, saved with configuration ") and not judged.bad
    first.load_state_dict(judged.state)
    assert checksum(first.state_dict()) == first.state_dict()["checksum"] and first.reducer.state.norm() > 0
    bad = first.judge(lambda: {**state, "step": 4}, 0, 2)
    assert bad.bad and bad.state == {} and "checksum" in bad.standing
    second = session("topk")
    second.load_state_dict(second.judge(lambda: state, 0, 2).state)
    said = capsys.readouterr().err
    assert "scheme ('scalecom' then, 'topk' now)" in said and "they start at zero" in said
    assert second.reducer.step == 3 and second.reducer.state.norm() == 0
