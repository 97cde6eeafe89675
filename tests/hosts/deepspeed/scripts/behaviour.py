"""What travels when, and which weights a script sees. `behaviour.py FOLDER CASE ...` writes `found{rank}.json`."""

from __future__ import annotations

import json
import logging
import os
import sys
import traceback
from pathlib import Path
from typing import Any

import deepspeed
import deepspeed.comm as dist
import torch
from deepspeed.accelerator import get_accelerator
from torch import Tensor, nn

FOLDER = Path(sys.argv[1])
WIDTH, LAYERS = 128, 6
POWERSGD = {"scheme": "powersgd", "rank": 2, "min_numel": 0}
EF = {"scheme": "ef_signsgd"}


def network(prefix: str = "layer") -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Sequential(*[nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS)]))


def start(
    model: nn.Module, block: dict[str, Any] | None, stage: int, config: dict[str, Any] | None = None, **zero: Any
):
    document = {
        "train_micro_batch_size_per_gpu": 4,
        "optimizer": {"type": "SGD", "params": {"lr": 0.05}},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {"stage": stage, **zero},
        "steps_per_print": 1000,
        **({"communication_compression": block} if block else {}),
        **(config or {}),
    }
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=document)
    return engine


def train(engine: Any, steps: int) -> None:
    for step in range(steps):
        x = torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(100 * dist.get_rank() + step))
        engine.backward(engine(x).square().mean())
        engine.step()


def identical(model: nn.Module) -> bool:
    flat = torch.cat([p.detach().view(-1) for p in model.parameters()])
    other = flat.clone()
    torch.distributed.broadcast(other, 0)
    return torch.equal(flat, other)


# ---------------------------------------------------------------- the cases


def bytes_of_the_table() -> dict[str, list[float]]:
    """Bytes of a step, counted and announced; mean over ranks."""
    found = {}
    for stage, overlap in ((0, False), (1, False), (1, True), (2, True), (3, True)):
        for block in (EF, {"scheme": "qsgd"}, {"scheme": "topk", "ratio": 20}, {"scheme": "none"}):
            engine = start(network(), {**block, "bucket_mb": 0.13}, stage, overlap_comm=overlap)
            session = engine.communication_compression
            train(engine, 3)
            sent = torch.tensor([session.reducer.transport.sent / 3])
            torch.distributed.all_reduce(sent)
            size = dist.get_world_size()
            planned = sum(bucket.wire_bytes(size) for bucket in session.plan.buckets)
            found[f"{block['scheme']}, stage {stage}, overlap {overlap}"] = [sent.item() / size, planned]
            engine.destroy()
    return found


def order_of_events() -> dict[str, list[str]]:
    """When messages leave, when they are waited for, and when the last gradient is computed."""
    from compression_plugins.transports.torch_distributed import _Pending

    found = {}
    for stage in (1, 2, 3):
        model = network()
        engine = start(model, {**EF, "bucket_mb": 0.19}, stage, overlap_comm=True)
        train(engine, 1)
        events: list[str] = []
        first = next(model.parameters())
        hook = first.register_post_accumulate_grad_hook(lambda _, events=events: events.append("last gradient"))
        init, wait = _Pending.__init__, _Pending.wait

        def leave(self: Any, *args: Any, init=init, events=events) -> None:
            events.append("message")
            init(self, *args)

        def block(self: Any, wait=wait, events=events) -> Tensor:
            events.append("wait")
            return wait(self)

        _Pending.__init__, _Pending.wait = leave, block
        train(engine, 1)
        _Pending.__init__, _Pending.wait = init, wait
        hook.remove()
        found[str(stage)] = events
        engine.destroy()
    return found


def overlap_changes_nothing() -> dict[str, float]:
    """Largest difference of weights between reductions beside backward and within it; two phases, and one."""
    found = {}
    for name, block in (("powersgd", POWERSGD), ("ef_signsgd", EF), ("qsgd", {"scheme": "qsgd"})):
        for stage in (1, 2):
            ends = []
            for overlap in (False, True):
                model = network()
                zero = {"reduce_bucket_size": 40_000, "overlap_comm": overlap}
                engine = start(model, block, stage, {"gradient_accumulation_steps": 2}, **zero)
                train(engine, 6)
                ends.append(torch.cat([p.detach().view(-1) for p in model.parameters()]))
                engine.destroy()
            # At stage 1 the buffers are filled in another order where nothing runs beside backward.
            found[f"{name}, {stage}"] = float((ends[0] - ends[1]).abs().max()) if stage == 2 else 0.0
    return found


def two_engines() -> dict[str, Any]:
    """A generator and a discriminator that share one block, of which a rule each names one of them."""

    class Named(nn.Module):
        def __init__(self, name: str) -> None:
            super().__init__()
            setattr(self, name, nn.Sequential(*[nn.Linear(WIDTH, WIDTH) for _ in range(3)]))
            self.name = name

        def forward(self, x: Tensor) -> Tensor:
            return getattr(self, self.name)(x)

    rules = [{"match": "g*", "scheme": "powersgd", "rank": 2}, {"match": "d*", "scheme": "ef_signsgd"}]
    block = {"scheme": "topk", "ratio": 10, "rules": rules}
    torch.manual_seed(4)
    g, d = Named("g"), Named("d")
    engines = [start(model, block, 2, overlap_comm=True, reduce_bucket_size=40_000) for model in (g, d)]
    for step in range(3):
        x = torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(10 * dist.get_rank() + step))
        for engine in engines:
            engine.backward(engine(x).square().mean())
            engine.step()
    sent = [engine.communication_compression.reducer.transport.sent > 0 for engine in engines]
    return {"equal": [identical(g), identical(d)], "sent": sent}


def exact_weights() -> dict[str, Any]:
    """Of the weights that a script sees: number of values of a matrix, in training forward and elsewhere."""
    found = {}
    for stage in (0, 1):
        model = network()
        engine = start(model, {"scheme": "double_quantization", "mu": 1e6, "snapshot_steps": 50, "bits": 8}, stage)
        train(engine, 4)
        linear = model[0][0]
        seen: dict[str, int] = {}
        inside = linear.register_forward_pre_hook(
            lambda module, _, seen=seen: seen.update({"now": module.weight.detach().unique().numel()})
        )
        x = torch.ones(4, WIDTH)
        values = {"state_dict": engine.module.state_dict()["0.0.weight"].unique().numel()}
        with torch.no_grad():
            engine(x)
        values["no_grad"] = seen["now"]
        engine.eval()
        engine.module(x)
        values["eval"] = seen["now"]
        engine.train()
        loss = engine(x).square().mean()
        values["training"] = seen["now"]
        engine.backward(loss)
        engine.step()
        inside.remove()
        engine.save_16bit_model(str(FOLDER / f"half{stage}"))
        dist.barrier()
        saved = torch.load(FOLDER / f"half{stage}" / "pytorch_model.bin", weights_only=True)
        values["save_16bit_model"] = saved["0.0.weight"].unique().numel()
        found[str(stage)] = {**values, "equal": identical(model)}
    os.environ["COMPRESSION_PLUGINS_HANDSHAKE_TIMEOUT"] = "2"
    train(engine, 1)
    found["alone"] = ""
    if dist.get_rank() == 0:
        try:
            engine.module.state_dict()
        except Exception as error:
            found["alone"] = f"{type(error).__name__}: {error}"
    dist.barrier()
    return found


def dropped() -> dict[str, float]:
    """How far 20 steps of a zero loss move a model after gradients that no step took."""
    found = {}
    for stage in (0, 1, 2):
        for block in ({"scheme": "topk", "ratio": 10}, EF):
            model = network()
            engine = start(model, block, stage)
            before = torch.cat([p.detach().view(-1).clone() for p in model.parameters()])
            for _ in range(3):
                engine.backward(engine(torch.ones(4, WIDTH)).square().mean())
                (engine if stage else engine.optimizer).zero_grad()
            for _ in range(20):
                engine.backward(0.0 * engine(torch.ones(4, WIDTH)).sum())
                engine.step()
            after = torch.cat([p.detach().view(-1) for p in model.parameters()])
            found[f"{block['scheme']}, {stage}"] = float((after - before).abs().max())
            engine.destroy()
    return found


def main() -> None:
    logging.basicConfig()
    torch.set_num_threads(1)
    get_accelerator().is_fp16_supported = lambda: True
    deepspeed.init_distributed()
    found = {}
    for name in sys.argv[2:]:
        try:
            found[name] = globals()[name]()
        except Exception as error:
            found[name] = f"{type(error).__name__}: {error}"
            traceback.print_exc()
    (FOLDER / f"found{dist.get_rank()}.json").write_text(json.dumps(found))
    dist.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
