"""A rate of compression for every layer, from what a worker computes for each value of its gradient.

A layer that computes long for each value that it sends can be compressed gently. Chen et al. (2020, arXiv 2104.11125)
give a rule for vision at 32 samples per worker, which we know second-hand: 25x, 50x or 400x as the FLOPs per gradient
element are above 196, above 128, or fewer. How they count is not established. The reading here: multiply-adds per
weight and sample (196 is a map of 14 x 14, at 50x), first convolution dense, last layer compressed like the others.
ResNet-18, ResNet-50 and MobileNetV2 then send 116, 97 and 166 times fewer weights; the paper prints 112, 96 and 155.

A plan knows shapes only and training scripts stay as they are, so the rates are found once, beside the job:

    compression-plugins rates package.module:function     # prints the block `rules:` for the YAML of the job
"""

from __future__ import annotations

import glob
import importlib
import json
import warnings
from bisect import bisect_right
from collections import Counter
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from ..config.config import Settings
from ..errors import ConfigError

#: Multiply-adds per weight and sample above which a ratio holds, at `SAMPLES` samples per worker.
RATIOS = ((196.0, 25), (128.0, 50), (0.0, 400))
SAMPLES = 32


class LayerRatio(NamedTuple):
    """What one weight should do.

    Attributes:
        name: as in `model.named_parameters()`, which is how both hosts call it.
        work: multiply-adds for each value of its gradient at a step of one worker, over `SAMPLES`.
        ratio: keep one value in so many; None: travel as it is.
        reason: why, in a few words.
    """

    name: str
    work: float
    ratio: int | None
    reason: str

    @property
    def rule(self) -> dict[str, Any]:
        """As an element of `rules:` in a configuration whose scheme is `scalecom`."""
        match = glob.escape(self.name)
        return {"match": match, "scheme": "none"} if self.ratio is None else {"match": match, "ratio": self.ratio}


def ratio_of(work: float) -> int:
    """The ratio for so many multiply-adds per weight and sample, at 32 samples per worker."""
    return next((ratio for above, ratio in RATIOS if work > above), RATIOS[-1][1])


def scalecom_ratios(model: nn.Module, example: Any) -> list[LayerRatio]:
    """Rates for the weights of `model`, found by one forward pass.

    Multiply-adds are counted where a matrix product or convolution uses a weight. With more samples a worker computes
    more for each value, and the rates fall, as we understand that they should.

    What travels as it is: the first convolution; embeddings, also when tied to the last layer; weights that no product
    uses (position tables, norms over two dimensions). Tensors with fewer than two dimensions and those below
    `min_numel` get no rate: the defaults exempt them.

    Args:
        model: runs in evaluation mode, and in its own mode again afterwards.
        example: the batch that one worker computes at a step: a tensor, or a tuple or dict of the model's arguments.

    Raises:
        ConfigError: the forward pass failed, or `model` is no module.
    """
    if not isinstance(model, nn.Module):
        raise ConfigError(f"rates are those of a torch.nn.Module, not of {type(model).__name__}")
    smallest = Settings.model_fields["min_numel"].default
    weights = {n: p for n, p in model.named_parameters() if p.requires_grad and p.dim() > 1 and p.numel() >= smallest}
    count = _Count(weights)
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        # Fused recurrent kernels would hide their products.
        with warnings.catch_warnings(), torch.backends.cudnn.flags(enabled=False):
            warnings.simplefilter("ignore")
            with torch.backends.mkldnn.flags(enabled=False), count:
                _call(model, example)
    except Exception as error:
        raise ConfigError(f"rates: the forward pass failed: {type(error).__name__}: {error}") from error
    finally:
        for module, mode in modes.items():
            module.training = mode
    return [_rate(name, p.numel(), count) for name, p in weights.items()]


def rules_yaml(rates: list[LayerRatio]) -> str:
    """The block `rules:` of a configuration, a comment a line."""
    lines = [f"  - {_flow(rate)}" for rate in rates]
    width = max(map(len, lines), default=0)
    head = f"rules:  # work: multiply-adds for each weight at a step of one worker, over {SAMPLES}"
    return "\n".join([head, *(f"{line:{width}}  # {rate.reason}" for line, rate in zip(lines, rates))])


def load_example(name: str) -> tuple[nn.Module, Any]:
    """Import `module:function` and call it; it returns (model, a worker's batch)."""
    module, _, function = name.partition(":")
    try:
        result = getattr(importlib.import_module(module), function)()
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"rates {name}: write MODULE:FUNCTION ({error})") from None
    if not isinstance(result, tuple) or len(result) != 2:
        raise ConfigError(f"rates {name}: it must return (model, batch), not {type(result).__name__}")
    return result


class _Count(TorchDispatchMode):
    """Multiply-adds of each weight, which embeddings are, and which convolution comes first."""

    def __init__(self, weights: dict[str, nn.Parameter]) -> None:
        super().__init__()
        self.products: Counter[str] = Counter()
        self.embeddings: set[str] = set()
        self.first_convolution: str | None = None
        # Views of a weight (transposed, or a part of it) are known by their address.
        self._spans = sorted((p.data_ptr(), p.data_ptr() + p.numel() * p.element_size(), n) for n, p in weights.items())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        operation = func.overloadpacket
        names = [self._owner(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        used = {name for name in names if name is not None}
        if operation in (torch.ops.aten.embedding, torch.ops.aten._embedding_bag):
            self.embeddings |= used
        elif operation in flop_registry:
            for name in used:
                self.products[name] += flop_registry[operation](*args, **(kwargs or {}), out_val=out) // 2
            if operation is torch.ops.aten.convolution and self.first_convolution is None:
                self.first_convolution = next(iter(used), "")
        return out

    def _owner(self, tensor: Tensor) -> str | None:
        address = tensor.data_ptr()
        place = bisect_right(self._spans, (address, float("inf"))) - 1
        return self._spans[place][2] if place >= 0 and address < self._spans[place][1] else None


def _rate(name: str, numel: int, count: _Count) -> LayerRatio:
    work = count.products[name] / numel / SAMPLES
    if name == count.first_convolution:
        return LayerRatio(name, work, None, "first convolution")
    if name in count.embeddings:
        return LayerRatio(name, work, None, "embedding")
    if not work:
        return LayerRatio(name, work, None, "no matrix product uses it")
    return LayerRatio(name, work, ratio_of(work), f"work {work:.4g}")


def _flow(rate: LayerRatio) -> str:
    """A rule as one line of YAML."""
    pairs = (f"{key}: {json.dumps(value) if key == 'match' else value}" for key, value in rate.rule.items())
    return "{" + ", ".join(pairs) + "}"


def _call(model: nn.Module, example: Any) -> None:
    if isinstance(example, dict):
        model(**example)
    elif isinstance(example, (tuple, list)):
        model(*example)
    else:
        model(example)
