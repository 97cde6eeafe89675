"""A job in which rank 1 is killed at a random step, and one that goes on from the newest checkpoint; then what becomes
of tags that are used again, of damaged files and of a universal checkpoint.

Arguments: a folder, and `killed` or `resumed`.
"""

from __future__ import annotations

import contextlib
import io
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import deepspeed
import deepspeed.comm as dist
import torch

sys.path.insert(0, str(Path(__file__).parents[2]))
import state_damage

FOLDER, PHASE = Path(sys.argv[1]), sys.argv[2]
END, STEM = 12, "communication_compression"
BLOCK = {"scheme": "ef_signsgd", "block": 32, "min_numel": 0}
CONFIG = {
    "train_micro_batch_size_per_gpu": 4,
    "optimizer": {"type": "Adam", "params": {"lr": 0.01, "torch_adam": True}},
    "zero_optimization": {"stage": 1},
    "steps_per_print": 1000,
}


def build(block=BLOCK, **more):
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(16, 64), torch.nn.Tanh(), torch.nn.Linear(64, 8))
    config = {**CONFIG, **({"communication_compression": block} if block else {}), **more}
    return deepspeed.initialize(model=net, model_parameters=net.parameters(), config=config)[0]


def step(engine, number, dies=False):
    x = torch.randn(4, 16, generator=torch.Generator().manual_seed(10 * number + dist.get_rank()))
    engine.backward(engine(x).square().mean())
    if dies and dist.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    engine.step()


def weights(engine):
    return torch.cat([p.detach().float().flatten() for p in engine.module.parameters()])


def train(dies=END):
    engine = build()
    engine.load_checkpoint(str(FOLDER / "c"))
    first = engine.global_steps
    for number in range(first, END):
        step(engine, number, number == dies)
        if number % 2:
            engine.save_checkpoint(str(FOLDER / "c"), tag=f"step{number + 1}")
    return engine, first


def load(engine, tag, folder="c"):
    """What is raised and said, and the norm of what is then remembered."""
    said, raised = io.StringIO(), ""
    with contextlib.redirect_stderr(said):
        try:
            engine.load_checkpoint(str(FOLDER / folder), tag=tag)
        except ValueError as error:
            raised = str(error)
    dist.barrier()
    return raised, said.getvalue(), engine.communication_compression.reducer.state.norm()


def once(act):
    """On rank 0, while the others wait."""
    if dist.get_rank() == 0:
        act()
    dist.barrier()


def copied(tag, act=lambda folder: None):
    """A copy of the last checkpoint under another tag, changed by `act`."""

    def make():
        shutil.copytree(FOLDER / "c" / f"step{END}", FOLDER / "c" / tag)
        act(FOLDER / "c" / tag)

    once(make)
    return tag


def told():
    found, engine = {}, build()
    for kind in state_damage.TOLD:
        source, target = FOLDER / "c" / f"step{END}", FOLDER / "c" / f"damaged {kind}"
        once(lambda kind=kind, source=source, target=target: state_damage.damage(kind, source, target, STEM))
        found[kind] = load(engine, f"damaged {kind}")[0]
    return found


def used_again():
    """Files of an earlier save under a tag of DeepSpeed's: ignored, or gone."""
    engine, found = build(), {}

    def older(folder):
        for path in (FOLDER / "c" / "step8").glob(f"{STEM}*"):
            shutil.copy(path, folder)

    found["older"] = load(engine, copied("older", older))
    found["own"] = load(engine, copied("own"))
    plain, tag = build(block=None), copied("without")
    plain.save_checkpoint(str(FOLDER / "c"), tag=tag)
    dist.barrier()
    found["swept"] = not list((FOLDER / "c" / tag).glob(f"{STEM}*"))
    found["without"] = load(engine, tag)

    def other_size(folder):
        shutil.copy(folder / f"{STEM}_rank_00000_of_00002.pt", folder / f"{STEM}_rank_00000_of_00003.pt")

    tag = copied("sizes", other_size)
    engine.save_checkpoint(str(FOLDER / "c"), tag=tag)
    found["files"] = sorted(path.name for path in (FOLDER / "c" / tag).glob(f"{STEM}*"))
    return found


def universal(norm):
    """DeepSpeed's own conversion leaves the memory where it is, and loading finds it."""
    source = FOLDER / "c" / f"step{END}"
    command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--num_extract_workers", "1"]
    command += [
        "--inject_missing_state",
        "--num_merge_workers",
        "1",
        "--input_folder",
        str(source),
        "--output_folder",
        f"{source}_universal",
    ]
    once(lambda: subprocess.run(command, check=True, stdout=subprocess.DEVNULL))
    engine = build(checkpoint={"load_universal": True})
    return load(engine, f"step{END}_universal")[2] == norm


def main():
    torch.set_num_threads(1)
    deepspeed.init_distributed()
    if PHASE == "killed":
        dies = torch.tensor([random.SystemRandom().randrange(3, END)])
        dist.broadcast(dies, 0)
        (FOLDER / f"died{int(dies)}").touch()
        train(int(dies))
        raise SystemExit("rank 1 was to be killed")
    engine, first = train()
    norm = engine.communication_compression.reducer.state.norm()
    straight = build()
    for number in range(END):
        step(straight, number)
    report = {"first": first, "same": torch.equal(weights(engine), weights(straight)), "norm": norm}
    report |= {"told": told(), "again": used_again(), "universal": universal(norm)}
    torch.save(report, FOLDER / f"report{dist.get_rank()}.pt")
    dist.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
