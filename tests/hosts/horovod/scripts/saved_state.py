"""What ranks do with saved memory that is whole, gone, or damaged on rank 1. Argument: a folder."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import horovod.torch as hvd
import torch
from torch import nn

from compression_plugins import horovod as compression

sys.path.insert(0, str(Path(__file__).parents[2]))
import state_damage

FOLDER = Path(sys.argv[1])
hvd.init()
torch.set_num_threads(1)


def build():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 64), nn.Tanh(), nn.Linear(64, 4))
    optimizer = hvd.DistributedOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1),
        named_parameters=model.named_parameters(),
        compression=compression.Compression.marsit(min_numel=1, direction="momentum", flush_steps=4),
    )
    return model, optimizer


def train(model, optimizer, steps):
    for step in steps:
        optimizer.zero_grad()
        x = torch.randn(8, 16, generator=torch.Generator().manual_seed(100 * hvd.rank() + step))
        model(x).square().mean().backward()
        optimizer.step()


def wait():
    hvd.allreduce(torch.zeros(1), name="wait")


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def once(act):
    if hvd.rank() == 0:
        act()
    wait()


def told(folder, trained):
    """What a rank hears in the step after it has loaded `folder`: "" if it goes on."""
    model, optimizer = build()
    train(model, optimizer, range(trained))
    compression.load(optimizer, folder)
    try:
        train(model, optimizer, [9])
    except ValueError as error:
        return str(error)
    finally:
        wait()
    return ""


whole, optimizer = build()
train(whole, optimizer, range(6))
compression.save(optimizer, FOLDER / "memory")
middle = {name: value.clone() for name, value in whole.state_dict().items()}
train(whole, optimizer, range(6, 12))
found = {"rank": hvd.rank()}
for trained in (0, 3):  # into a session that has not begun, and into one that has
    model, optimizer = build()
    train(model, optimizer, range(trained))
    model.load_state_dict(middle)
    compression.load(optimizer, FOLDER / "memory")
    train(model, optimizer, range(6, 12))
    found[f"same after {trained}"] = torch.equal(weights(model), weights(whole))
found["nothing"] = told(FOLDER / "nowhere", 0)
for kind in state_damage.TOLD:
    folder = FOLDER / f"damaged {kind}"
    once(lambda kind=kind, folder=folder: state_damage.damage(kind, FOLDER / "memory", folder, "compression"))
    found[kind] = told(folder, 0)
found["later"] = told(FOLDER / "damaged flipped", 2)
print("RESULT " + json.dumps(found), flush=True)
