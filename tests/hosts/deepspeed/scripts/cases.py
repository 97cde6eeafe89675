"""Train one small model after the other, as `cases.json` in the given folder says, and report what came out.

A case: "config" (of DeepSpeed), "steps", and optionally "save" and "load" (tags), "save_step", "overflow" (a step in
which rank 1's loss is infinite), "leave_out" (a step that is not done), "scribble" (a step before which ranks write
different values to the model), "freeze" (a step from which on the learning rate is 0), "init" (the model is built under
`zero.Init`), "half" (a folder for `save_16bit_model`).
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import deepspeed
import deepspeed.comm as dist
import torch
from deepspeed.accelerator import get_accelerator

FOLDER = Path(sys.argv[1])
WIDTH = 48


class Network(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(64, WIDTH)
        self.norm = torch.nn.LayerNorm(WIDTH)
        self.first = torch.nn.Linear(WIDTH, 2 * WIDTH)
        self.second = torch.nn.Linear(2 * WIDTH, WIDTH)
        self.head = torch.nn.Linear(WIDTH, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.norm(self.embed(x))
        return self.head(h + self.second(torch.relu(self.first(h))))


def master(network: torch.nn.Module, session) -> torch.Tensor:
    """The weights that the optimizer holds, where they are not those of the network."""
    if not session.common.hooks:
        return torch.empty(0)
    with session.exact():
        return flat(network)


def evaluated(engine, network: torch.nn.Module) -> torch.Tensor:
    """The weights that an evaluation computes with."""
    with torch.no_grad():
        engine(torch.arange(16))
    return flat(network)


def flat(network: torch.nn.Module) -> torch.Tensor:
    with deepspeed.zero.GatheredParameters(list(network.parameters())):  # of ZeRO 3; elsewhere it does nothing
        return torch.cat([p.detach().float().view(-1) for p in network.parameters()])


def scribble(network: torch.nn.Module) -> None:
    with torch.no_grad():
        for p in network.parameters():
            p.add_(1.0 + dist.get_rank())


def train(case: dict) -> dict:
    torch.manual_seed(0)
    if case.get("init"):
        with deepspeed.zero.Init(config_dict_or_path=case["config"]):
            network = Network()
    else:
        network = Network()
    computed = []
    network.first.register_forward_hook(lambda module, *_: computed.append(module.weight.detach().clone()))
    engine, *_ = deepspeed.initialize(model=network, model_parameters=network.parameters(), config=case["config"])
    tag = case.get("load")
    first = 0
    if tag:
        engine.load_checkpoint(str(FOLDER / "checkpoints"), tag=tag)
        first = engine.global_steps
    session = getattr(engine, "communication_compression", None)
    losses, skipped, scales = [], [], []
    accumulation = engine.gradient_accumulation_steps()
    rows = torch.randperm(64, generator=torch.Generator().manual_seed(7))
    for step in range(first, case["steps"]):
        if step == case.get("leave_out"):
            continue
        for micro in range(accumulation):
            seed = (step * accumulation + micro) * dist.get_world_size() + dist.get_rank()
            x = torch.randint(0, 64, (16,), generator=torch.Generator().manual_seed(seed))
            loss = torch.nn.functional.cross_entropy(engine(x).float(), rows[x])
            if case.get("overflow") == step and dist.get_rank() == 1:
                loss = loss * float("inf")
            engine.backward(loss)
            if case.get("scribble") == step:
                scribble(network)
            if step >= case.get("freeze", case["steps"]):
                for group in engine.optimizer.param_groups:
                    group["lr"] = 0.0
            engine.step()
        losses.append(float(loss.detach()))
        skipped.append(engine.skipped_steps)
        scales.append(float(getattr(engine.optimizer, "loss_scale", 1.0)))
        if case.get("save") and step + 1 == case["save_step"]:
            engine.save_checkpoint(str(FOLDER / "checkpoints"), tag=case["save"])
    # A collective of the user's own, as large as a gradient bucket, must come back exact.
    metric = torch.arange(4096.0) * (1 + dist.get_rank())
    dist.all_reduce(metric)
    if case.get("half"):
        engine.save_16bit_model(str(FOLDER / case["half"]))
    report = {
        "weights": flat(network),
        "computed": computed[-accumulation:],
        "losses": losses,
        "skipped": skipped,
        "scales": scales,
        "metric": metric,
        "compressed": session is not None,
    }
    if session is not None:
        residuals = session.reducer.state_dict()["vectors"].get("residual", {})
        report |= {
            "sent": session.reducer.transport.sent,
            "dense": case["steps"] * sum(bucket.dense_bytes(dist.get_world_size()) for bucket in session.plan.buckets),
            "planned": sum(bucket.wire_bytes(dist.get_world_size()) for bucket in session.plan.buckets),
            "planned weights": session.weights.wire_bytes() if session.weights is not None else None,
            "dense weights": session.weights.dense_bytes() if session.weights is not None else None,
            "step": session.reducer.step,
            "residuals": residuals,
            "master": master(network, session),
        }
        if session.fetches is not None:
            report["sent of weights"] = session.fetches.sent
            report["fetched once"] = session.fetches.fetch_bytes()
        if session.weights is not None:
            report["evaluated"] = evaluated(engine, network)
        elif session.fetches is not None:
            evaluated(engine, network)
            report["evaluated"] = computed[-1]
    engine.destroy()
    return report


def main() -> None:
    torch.set_num_threads(1)
    # DeepSpeed refuses fp16 on a CPU without fp16 instructions; torch computes it there all the same, only slowly.
    get_accelerator().is_fp16_supported = lambda: True
    deepspeed.init_distributed()
    cases = json.loads((FOLDER / "cases.json").read_text())
    reports = {name: train(case) for name, case in cases.items()}
    torch.save(reports, FOLDER / f"report{dist.get_rank()}.pt")
    dist.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
