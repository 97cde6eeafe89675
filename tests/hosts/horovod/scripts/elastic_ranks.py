"""Three ranks, of which one is killed in mid-step, then two, then three again; SGD at learning rate 1.

Arguments: a folder, and whether model and optimizer are built `inside` of the elastic function or `outside`. The folder
has `hosts`, which the discovery script prints. Each rank notes the gradient of each step, so that in the end rank 0 can
tell what was computed from what was applied and what is still owed. A step that is done again is noted again.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

import horovod.torch as hvd
import torch
from torch import nn

from compression_plugins.horovod import finish, state_dict

folder, inside = Path(sys.argv[1]), sys.argv[2] == "inside"
hvd.init()
torch.set_num_threads(1)
log: dict[str, object] = {"sizes": []}


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 64), nn.Tanh(), nn.Linear(64, 4))


def wrap(model: nn.Module) -> torch.optim.Optimizer:
    return hvd.DistributedOptimizer(
        torch.optim.SGD(model.parameters(), lr=1.0), named_parameters=model.named_parameters()
    )


def residual(optimizer: torch.optim.Optimizer, model: nn.Module) -> torch.Tensor:
    vectors = state_dict(optimizer).get("vectors", {})
    found = torch.zeros(sum(p.numel() for p in model.parameters()))
    for name, whole in zip(dict(model.named_parameters()), found.split([p.numel() for p in model.parameters()])):
        for slot in ("residual", "update/residual"):
            for start, piece in vectors.get(slot, {}).get(name, {}).items():
                whole[start : start + piece.numel()] += piece
    return found


def weights(model: nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.state_dict().values()])


def note(name: str, **values: object) -> None:
    torch.save(values, folder / f"{name}.partial")
    os.replace(folder / f"{name}.partial", folder / f"{name}.pt")


@hvd.elastic.run
def train(state: hvd.elastic.TorchState) -> None:
    if inside:
        model = network()
        model.load_state_dict(state.model.state_dict())
        optimizer = wrap(model)
        state.model, state.optimizer = model, optimizer
    else:
        model, optimizer = state.model, state.optimizer
    log["sizes"].append(hvd.size())
    first = True
    while state.batch < state.end:
        optimizer.zero_grad()
        x = torch.randn(8, 16, generator=torch.Generator().manual_seed(100 * hvd.rank() + state.batch))
        loss = 0.02 * (model(x) - x[:, :4]).square().mean()
        grads = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
        note(f"gradient{state.batch}.{hvd.rank()}", size=hvd.size(), g=torch.cat([g.flatten() for g in grads]))
        loss.backward()
        if state.batch == 5 and os.environ["HOROVOD_HOSTNAME"] == "127.0.0.1" and not (folder / "killed").exists():
            (folder / "killed").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        optimizer.step()
        state.batch += 1
        if first and log["sizes"][0] == 3 and hvd.size() == 2:
            (folder / "hosts").write_text("localhost:3\n")  # one more may join
        if first and hvd.size() == 3 and (folder / "killed").exists():
            state.end = state.batch + 6 - state.batch % 2
        first = False
        if state.batch % 2 == 0:
            note(f"owed{state.batch}.{hvd.rank()}", owed=residual(optimizer, model), size=hvd.size())
            state.commit()
            time.sleep(0.05)
    finish(optimizer)
    owed = hvd.allreduce(residual(optimizer, model), name="owed")
    everywhere = hvd.allgather(weights(model)[None], name="weights")
    log["equal"] = bool((everywhere == everywhere[0]).all())
    if hvd.rank() == 0:
        computed = torch.zeros(owed.numel(), dtype=torch.float64)
        for step in range(state.batch):
            size = torch.load(folder / f"gradient{step}.0.pt")["size"]
            computed += sum(torch.load(folder / f"gradient{step}.{r}.pt")["g"].double() for r in range(size)) / size
        moved = weights(network()) - weights(model)
        log["missing"] = float((computed - owed - moved).abs().max())
        log["scale"] = float(moved.abs().max())
        log["owed"] = float(owed.abs().max())
    log["loss"], log["batch"] = float(loss), state.batch
    log["step"] = optimizer._compression_session.reducer.step


start = network()
plain = torch.optim.SGD(start.parameters(), lr=1.0)
train(hvd.elastic.TorchState(model=start, optimizer=plain if inside else wrap(start), batch=0, end=400))
print("RESULT " + json.dumps({**log, "rank": hvd.rank(), "size": hvd.size()}), flush=True)
