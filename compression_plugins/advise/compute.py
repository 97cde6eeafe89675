"""How long a rank computes, and when in backward each gradient is complete: measured on a model, or from its FLOPs."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ..engine.plan import TensorSpec
from ..errors import ConfigError
from .shapes import Shapes
from .work import clock

if TYPE_CHECKING:
    from torch import Tensor, nn

    from ..transports.base import Transport

_STEPS = 7


@dataclass(frozen=True)
class Compute:
    """A step of one rank without communication.

    Attributes:
        specs: the tensors in registration order.
        forward_s: seconds until backward starts.
        ready_s: for each tensor, seconds of backward after which its gradient is complete.
        backward_s: all of backward.
        update_s: the optimizer.
        note: where the numbers are from, for a person.
    """

    specs: tuple[TensorSpec, ...]
    forward_s: float
    ready_s: tuple[float, ...]
    backward_s: float
    update_s: float
    note: str

    @property
    def step_s(self) -> float:
        return self.forward_s + self.backward_s + self.update_s

    @property
    def numel(self) -> int:
        return sum(spec.numel for spec in self.specs)


def from_shapes(
    shapes: Shapes, compute_ms: float | None = None, tflops: float | None = None, batch: int | None = None
) -> Compute:
    """A third of the time is forward, the rest backward, in reverse order, each tensor by its FLOPs (else its size).

    Args:
        compute_ms: a whole step without communication; or
        tflops, batch: sustained rate of the device, and samples per rank and step.

    Raises:
        ConfigError: neither is given, or a file of shapes has no FLOPs.
    """
    if compute_ms is not None:
        seconds, note = compute_ms / 1e3, f"{compute_ms:g} ms per step without communication, as given"
    elif tflops is None or batch is None:
        raise ConfigError(
            "advise --shapes: how long does a step compute? give --compute-ms, or --tflops and --batch to estimate it"
        )
    elif shapes.total_flops is None:
        raise ConfigError(f"{shapes.name} is a file of shapes, whose FLOPs are not known; give --compute-ms")
    else:
        seconds = shapes.total_flops * batch / (tflops * 1e12)
        note = (
            f"{1e3 * seconds:.4g} ms per step, assumed: {batch} samples ({shapes.sample}) x "
            f"{shapes.total_flops / 1e9:.4g} GFLOP at {tflops:g} TFLOP/s"
        )
    weights = [float(spec.numel) for spec in shapes.specs] if shapes.flops is None else list(shapes.flops)
    total = sum(weights) + shapes.head_flops
    backward = seconds * 2 / 3
    ready, done = [0.0] * len(weights), shapes.head_flops
    for i in reversed(range(len(weights))):
        done += weights[i]
        ready[i] = backward * done / total
    return Compute(shapes.specs, seconds / 3, tuple(ready), backward, 0.0, note)


def from_model(model: nn.Module, example: Any, device: str) -> Compute:
    """Medians of some steps of `model` on `device`, with SGD with momentum as the optimizer.

    Args:
        example: the batch of one rank: a tensor, or a tuple or dict of the model's arguments. The loss is the model's
            result, its `loss`, or else the mean of its first tensor.

    Raises:
        ConfigError: the model or a step failed, or no parameter gets a gradient.
    """
    import torch
    from torch import nn

    if not isinstance(model, nn.Module):
        raise ConfigError(f"advise: the model is no torch.nn.Module but {type(model).__name__}")
    try:
        model = model.to(device).train()
        batch = _to(example, device)
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad and p.is_floating_point()]
        optimizer = torch.optim.SGD([p for _, p in named], lr=0.0, momentum=0.9)
        steps = [_step(model, batch, [p for _, p in named], optimizer, device) for _ in range(_STEPS + 2)][2:]
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError(f"advise: a step of the model failed: {type(error).__name__}: {error}") from error
    specs = tuple(TensorSpec(n, tuple(p.shape), str(p.dtype).removeprefix("torch."), str(p.device)) for n, p in named)
    median = [statistics.median(column) for column in zip(*steps)]
    forward, backward, update, *ready = median
    note = _timed(sum(median[:3]), f"this {torch.device(device).type}")
    return Compute(specs, forward, tuple(min(r, backward) for r in ready), backward, update, note)


def _timed(seconds: float, where: str) -> str:
    return f"{1e3 * seconds:.4g} ms per step without communication, measured on {where}"


def slowest(compute: Compute, transport: Transport) -> Compute:
    """Every rank waits for the slowest: its times, on all ranks."""
    from .measure import over_ranks

    mine = [compute.forward_s, compute.backward_s, compute.update_s, *compute.ready_s]
    rows = over_ranks(transport, mine)
    forward, backward, update, *ready = rows[int(rows[:, :3].sum(1).argmax())].tolist()
    note = _timed(forward + backward + update, f"the slowest of {transport.size} ranks")
    return replace(compute, forward_s=forward, backward_s=backward, update_s=update, ready_s=tuple(ready), note=note)


def _step(model: nn.Module, batch: Any, parameters: list[Tensor], optimizer: Any, device: str) -> list[float]:
    """[forward, backward, update, when each gradient is complete]; seconds.

    On a GPU hooks run ahead of the device, so that there the gradients' times are spread by the hooks' own.
    """
    import torch

    seconds = clock(device)
    ready = [0.0] * len(parameters)

    def note(i: int) -> Callable[[Tensor], None]:
        def hook(_: Tensor) -> None:
            ready[i] = time.perf_counter()

        return hook

    handles = [p.register_post_accumulate_grad_hook(note(i)) for i, p in enumerate(parameters)]
    try:
        optimizer.zero_grad()
        start = seconds()
        loss = _loss(_call(model, batch))
        begin = seconds()
        loss.backward()
        issued = time.perf_counter()
        end = seconds()
        optimizer.step()
        update = seconds() - end
    finally:
        for handle in handles:
            handle.remove()
    if not any(ready):
        raise ConfigError("advise: no parameter of the model gets a gradient")
    stretch = (end - begin) / max(1e-9, issued - begin) if torch.device(device).type == "cuda" else 1.0
    return [begin - start, end - begin, update, *((r - begin) * stretch if r else end - begin for r in ready)]


def _call(model: nn.Module, example: Any) -> Any:
    if isinstance(example, dict):
        return model(**example)
    return model(*example) if isinstance(example, (tuple, list)) else model(example)


def _loss(out: Any) -> Tensor:
    import torch
    from torch.utils._pytree import tree_leaves

    if isinstance(getattr(out, "loss", None), torch.Tensor):
        return out.loss
    first = next((leaf for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor) and leaf.requires_grad), None)
    if first is None:
        raise ConfigError("advise: the model's result has no gradient")
    return first.float().mean()


def _to(example: Any, device: str) -> Any:
    from torch.utils._pytree import tree_map

    return tree_map(lambda leaf: leaf.to(device) if hasattr(leaf, "to") else leaf, example)
