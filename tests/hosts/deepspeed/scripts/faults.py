"""What a script does between backward and step, under DeepSpeed; each case with and without the block.

`faults.py FOLDER one|two`: the cases for one rank, or for two. Writes `found{rank}.json`.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import deepspeed
import deepspeed.comm as dist
import torch
from deepspeed.accelerator import get_accelerator
from torch import Tensor, nn

FOLDER = Path(sys.argv[1])
found: dict[str, Any] = {}
STOCK = None
EVERYTHING = {"scheme": "topk", "ratio": 1, "min_numel": 0}


def block_of(scheme: str) -> dict[str, Any] | None:
    ratio = {"ratio": 8} if scheme in ("topk", "scalecom") else {}
    return STOCK if scheme == "stock" else {"scheme": scheme, "min_numel": 0, **ratio}


class Parts(nn.Module):
    """A trunk, and layers of which a step may call any."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.trunk = nn.Linear(16, 24)
        self.a, self.b, self.never = (nn.Linear(24, 24) for _ in range(3))

    def forward(self, x: Tensor, *layers: str) -> Tensor:
        x = self.trunk(x)
        for name in layers:
            x = x + getattr(self, name)(torch.tanh(x))
        return x.float().square().mean()


def start(model: nn.Module, block: dict[str, Any] | None, stage: int = 0, **more: Any) -> Any:
    config = {
        "train_micro_batch_size_per_gpu": 4,
        "optimizer": {"type": "SGD", "params": {"lr": 0.1}},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {"stage": stage},
        "steps_per_print": 1000,
        **({"communication_compression": block} if block else {}),
        **more,
    }
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)
    return engine


def batch(step: int) -> Tensor:
    return torch.randn(4, 16, generator=torch.Generator().manual_seed(1000 * dist.get_rank() + step))


def train(engine: Any, steps: Any, *layers: str, factor: float = 1.0) -> None:
    for step in steps:
        engine.backward(factor * engine(batch(step), *layers))
        engine.step()


def drop(engine: Any, step: int) -> None:
    """A gradient that is thrown away: no `step()`."""
    engine.backward(engine(batch(step), "a", "b"))
    engine.zero_grad()


def bits(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def gap(a: Tensor, b: Tensor) -> float:
    """Largest difference of two elements: 0.0 for equal tensors only, infinite where one is not a number."""
    return float((a.detach().double() - b.detach().double()).abs().nan_to_num(nan=float("inf")).max())


def changed(before: list[Tensor], model: nn.Module) -> float:
    return max(gap(a, b) for a, b in zip(before, model.parameters()))


def identical(model: nn.Module) -> bool:
    flat = torch.cat([p.detach().view(-1).double() for p in model.parameters()])
    other = flat.clone()
    torch.distributed.broadcast(other, 0)
    return torch.equal(flat, other)


# ---------------------------------------------------------------- the cases


def an_unfrozen_layer(stage: int) -> dict[str, Any]:
    """Frozen when the engine is made, trained from the fourth step on."""
    ends, moved = [], []
    for block in (STOCK, EVERYTHING):
        model = Parts()
        model.b.requires_grad_(False)
        engine = start(model, block, stage)
        train(engine, range(3), "a", "b")
        model.b.requires_grad_(True)
        before = bits(model.b)
        train(engine, range(3, 6), "a", "b")
        ends.append(model)
        moved.append([changed(before, model.b), identical(model)])
    return {"distance": changed(bits(ends[0]), ends[1]), "stock": moved[0], "ours": moved[1]}


def a_frozen_layer(scheme: str) -> dict[str, float]:
    model = Parts()
    engine = start(model, block_of(scheme))
    train(engine, range(3), "a", "b")
    model.b.requires_grad_(False)
    before, trunk = bits(model.b), bits(model.trunk)
    train(engine, range(3, 9), "a", "b")
    return {"frozen": changed(before, model.b), "trained": changed(trunk, model.trunk)}


def a_layer_without_gradients(scheme: str) -> dict[str, float]:
    """Called three times and then no more; another never."""
    model = Parts()
    engine = start(model, block_of(scheme))
    never = bits(model.never)
    train(engine, range(3), "a", "b")
    before, trunk = bits(model.b), bits(model.trunk)
    train(engine, range(3, 9), "a")
    return {
        "called no more": changed(before, model.b),
        "never called": changed(never, model.never),
        "trained": changed(trunk, model.trunk),
    }


def dropped_gradients(scheme: str) -> float:
    model = Parts()
    engine = start(model, block_of(scheme))
    before = bits(model)
    for step in range(3):
        drop(engine, step)
    train(engine, range(20), "a", "b", factor=0.0)
    return changed(before, model)


def a_dropped_gradient_on_the_way(scheme: str) -> float:
    ends = []
    for drops in (False, True):
        model = Parts()
        engine = start(model, block_of(scheme))
        train(engine, range(4), "a", "b")
        if drops:
            drop(engine, 99)
        train(engine, range(4, 10), "a", "b")
        ends.append(model)
    return changed(bits(ends[0]), ends[1])


def an_overflow(scheme: str) -> dict[str, Any]:
    """A step that ZeRO 1 in fp16 skips, and the same steps without it."""
    ends, skipped = [], 0
    fp16 = {"enabled": True, "initial_scale_power": 10, "hysteresis": 1, "loss_scale_window": 100}
    for bad in (4, None):
        model = Parts()
        engine = start(model, block_of(scheme), 1, fp16=fp16)
        for step in range(10):
            if step == 4 and bad is None:
                continue
            loss = engine(batch(step).half(), "a", "b")
            engine.backward(loss * float("inf") if step == bad and dist.get_rank() == 1 else loss)
            engine.step()
        skipped = max(skipped, engine.skipped_steps)
        ends.append(model)
    return {"distance": changed(bits(ends[0]), ends[1]), "skipped": skipped}


@contextmanager
def counted() -> Iterator[dict[str, int]]:
    """Bytes that are handed to `torch.distributed.all_reduce`, by dtype."""
    sizes: dict[str, int] = {}
    original = torch.distributed.all_reduce

    def all_reduce(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        if tensor.is_floating_point() and tensor.numel() > 1:
            name = str(tensor.dtype)
            sizes[name] = sizes.get(name, 0) + tensor.numel() * tensor.element_size()
        return original(tensor, *args, **kwargs)

    torch.distributed.all_reduce = all_reduce
    try:
        yield sizes
    finally:
        torch.distributed.all_reduce = original


def exempt_bf16(stage: int) -> dict[str, Any]:
    """Bytes of one step in which one matrix of 384 values is compressed and all the rest exempt."""
    sizes, ends = {}, []
    block = {"scheme": "topk", "ratio": 8, "min_numel": 0, "exempt": ["a.*", "b.*", "never.*"]}
    for name, compression in (("stock", STOCK), ("ours", block)):
        path = FOLDER / f"telemetry{stage}.jsonl"
        os.environ["COMPRESSION_PLUGINS_TELEMETRY"] = str(path)
        model = Parts()
        engine = start(model, compression, stage, bf16={"enabled": True}, gradient_clipping=0.0)
        with counted() as sizes[name]:
            engine.backward(engine(batch(0).bfloat16(), "a", "b", "never"))
            engine.step()
        del os.environ["COMPRESSION_PLUGINS_TELEMETRY"]
        ends.append(model)
    values = sum(p.numel() for p in ends[0].parameters())
    # Telemetry is rank 0's.
    sent = json.loads(path.read_text().splitlines()[0])["sent_bytes"] if dist.get_rank() == 0 else None
    others = [(p, q) for p, q in zip(ends[0].parameters(), ends[1].parameters()) if p is not ends[0].trunk.weight]
    return {**sizes, "values": values, "sent": sent, "distance": max(gap(p, q) for p, q in others)}


def one_rank(stage: int) -> dict[str, float]:
    distances = {}
    plain = Parts()
    train(start(plain, STOCK, stage), range(5), "a", "b")
    for scheme in ("stock", "topk", "ef_signsgd", "signsgd", "marsit", "double_quantization"):
        model = Parts()
        train(start(model, block_of(scheme), stage), range(5), "a", "b")
        distances[scheme] = changed(bits(plain), model)
    return distances


REMEMBER = ("topk", "scalecom", "powersgd", "ef_signsgd", "marsit")
CASES: dict[str, list[tuple[Callable[..., Any], tuple[Any, ...]]]] = {
    "one": [(one_rank, (0, 1))],
    "two": [
        (a_frozen_layer, ("stock", *REMEMBER, "signsgd", "ssdm")),
        (a_layer_without_gradients, ("stock", *REMEMBER, "signsgd", "ssdm")),
        (dropped_gradients, ("stock", *REMEMBER)),
        (a_dropped_gradient_on_the_way, ("stock", *REMEMBER)),
        (an_overflow, ("stock", "topk", "ef_signsgd")),
        (exempt_bf16, (0, 1)),
        (an_unfrozen_layer, (0, 1, 2)),
    ],
}


def main() -> None:
    torch.set_num_threads(1)
    get_accelerator().is_fp16_supported = lambda: True
    deepspeed.init_distributed()
    for function, arguments in CASES[sys.argv[2]]:
        for argument in arguments:
            name = f"{function.__name__}[{argument}]"
            try:
                found[name] = function(argument)
            except Exception as error:
                found[name] = f"{type(error).__name__}: {error}"
                traceback.print_exc()  # for whoever reads the output of a job that failed
    (FOLDER / f"found{dist.get_rank()}.json").write_text(json.dumps(found))
    dist.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
