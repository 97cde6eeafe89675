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
    """Continue, bit for bit, from a `state_dict` of this rank, after the weights are loaded; on every rank, which then
    compare what they have: at once, or before the first step when they begin it. All continue, or all stop.

    Args:
        state: this rank's, or a list of all ranks' in rank order. From a list of another number of ranks each rank gets
            the mean of their memories.

    Raises:
        CompressionError: on every rank: some rank's state is damaged, of another rank, of another number of ranks, of
            another step, or of another version of this package; from here, or before the first step from `backward`.
        UnsupportedError: nothing compresses this model.
    """
    from .adapters.ddp.hook import find

    find(model).load(lambda: state)


def save(model: torch.nn.Module, folder: str | os.PathLike[str]) -> None:
    """Write `state_dict(model)` of this rank to a file of its own in `folder`, which appears when all of it is on the
    disk; files of another number of ranks are removed. Call it on every rank.

    Raises:
        CompressionError: why it cannot be written; an older file is as it was.
        UnsupportedError: nothing compresses this model.
    """
    from .adapters.ddp.hook import find

    find(model).save(folder)


def load(model: torch.nn.Module, folder: str | os.PathLike[str]) -> None:
    """Continue from what `save` wrote into `folder`; on every rank, after the weights are loaded.

    As many ranks continue bit for bit, another number from the mean of their memories. Where there is nothing, memory
    starts at zero.

    Raises:
        CompressionError: as `load_state_dict`; also where files are missing or damaged.
        UnsupportedError: nothing compresses this model.
    """
    from .adapters.ddp.hook import find

    find(model).load_folder(folder)


class Stateful:
    """This rank's memory as `torch.distributed.checkpoint` saves and loads it, under a name of its own for each rank,
    for as many ranks as saved it::

        app = {"model": model.module.state_dict(), "compression": compression_plugins.ddp.Stateful(model)}
        torch.distributed.checkpoint.save(app, checkpoint_id=folder)

    Args:
        model: as for `state_dict`.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        from .adapters.ddp.hook import find

        self._compression = find(model)

    def state_dict(self) -> dict[str, bytes]:
        """One text of bytes, for what a method keeps is known only when it has begun."""
        from .engine.saved import packed

        return {f"rank{self._compression.rank}": packed(self._compression.state_dict())}

    def load_state_dict(self, saved: Mapping[str, bytes]) -> None:
        """As `load_state_dict` of this module."""
        from .engine.saved import unpacked

        self._compression.load(lambda: unpacked(saved[f"rank{self._compression.rank}"]))
