"""Compression for torch DDP in the script's own words.

    model = DistributedDataParallel(model)
    compression_plugins.ddp.compress(model, "scalecom", ratio=50)

Under `compression-plugins torchrun --compression scalecom`, `compress` is not needed; `state_dict` works all the same.
Import this module before a `torch.amp.GradScaler` is made: residuals are kept in units of the unscaled loss, and only
scalers made from then on are noticed.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .engine import loss_scale

if TYPE_CHECKING:
    import torch
    from torch.nn.parallel import DistributedDataParallel

loss_scale.watch()


def compress(
    model: DistributedDataParallel, config: str | os.PathLike[str] | Mapping[str, Any], **overrides: Any
) -> None:
    """Compress the gradients of `model`, on every rank alike, before its first backward pass.

    Args:
        config: the name of a scheme, the path of a YAML or JSON file, or a mapping.
        overrides: keys that replace those of `config`.

    Raises:
        ConfigError: what is wrong, where, and the nearest valid choice.
        UnsupportedError: the model has a communication hook already, or cannot be reduced this way.
    """
    from .adapters.ddp.hook import attach
    from .config import Config

    attach(model, Config.load(config, overrides), explicit=True)


def finish(model: torch.nn.Module, optimizer: torch.optim.Optimizer | None = None) -> None:
    """Training is over: with `every` > 1, exchange what the last, partial round has learned, so that every rank holds
    the same weights. Call it on all ranks. Harmless otherwise.

    Args:
        model: the DDP model, or one around it or inside of it.
        optimizer: whose moments are averaged too (`outer: {moments: mean}`).

    Raises:
        UnsupportedError: nothing compresses this model.
    """
    from .adapters.ddp.hook import find

    find(model).session.finish(optimizer)


def state_dict(model: torch.nn.Module) -> dict[str, Any]:
    """This rank's memory of what has not been sent yet, as of the last optimizer step; {} before the first.

    It differs on every rank and is no part of `model.state_dict()`. Plain dicts, numbers and tensors: it loads with
    `torch.load(..., weights_only=True)`.

    Args:
        model: the DDP model, or one around it or inside of it.

    Raises:
        UnsupportedError: nothing compresses this model.
    """
    from .adapters.ddp.hook import find

    return find(model).state_dict()


def load_state_dict(model: torch.nn.Module, state: Mapping[str, Any] | Sequence[Mapping[str, Any]]) -> None:
    """Continue, bit for bit, from a `state_dict` of this rank, after the weights are loaded.

    Args:
        state: this rank's, or a list of all ranks' in rank order. From a list of another number of ranks each rank gets
            the mean of their memories.

    Raises:
        CompressionError: a state of another rank, of another number of ranks, or of another version of this package.
        UnsupportedError: nothing compresses this model.
    """
    from .adapters.ddp.hook import find

    find(model).load_state_dict(state)
