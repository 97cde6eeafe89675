"""What kind of DDP model can be compressed, and how its buckets hold gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from ...config import Config
from ...errors import UnsupportedError


def refuse(ddp: Any) -> None:
    """Raise `UnsupportedError` for what has no room for a communication hook of ours."""
    if not isinstance(ddp, DistributedDataParallel):
        raise UnsupportedError(f"DDP compression: needs a DistributedDataParallel, not a {type(ddp).__name__}")
    reasons = {
        "mixed_precision= has a communication hook of its own; use torch.autocast": ddp.mixed_precision is not None,
        "skip_all_reduce_unused_params= leaves buckets out; use find_unused_parameters=": getattr(
            ddp, "skip_all_reduce_unused_params", False
        ),
        "the python_reducer of torch.compile calls no hook with buckets; use optimize_ddp = True": getattr(
            ddp, "_use_python_reducer", False
        ),
        "an optimizer that runs in backward has a communication hook of its own; step it after backward": any(
            hasattr(p, "_in_backward_optimizers") for p in ddp.module.parameters()
        ),
        "all parameters are in delay_all_reduce_named_params=, which DDP reduces without buckets": not hasattr(
            ddp, "reducer"
        ),
    }
    for reason, holds in reasons.items():
        if holds:
            raise UnsupportedError(f"DDP compression: {reason}")


def hook_of(ddp: Any) -> str:
    """Name of the communication hook that is registered, built-in ones included; "" if there is none."""
    return str(ddp._get_ddp_logging_data().get("comm_hook", ""))


def sparse(module: torch.nn.Module) -> set[int]:
    """ids of parameters whose gradients are sparse."""
    embeddings = (torch.nn.Embedding, torch.nn.EmbeddingBag)
    return {id(m.weight) for m in module.modules() if isinstance(m, embeddings) and m.sparse}


def image(gradient: Tensor, p: Tensor, buffer: Tensor) -> Tensor:
    """`gradient`, part of a bucket's buffer, with the strides of its parameter: DDP keeps the order of memory."""
    if p.is_contiguous() or not _dense(p):
        return gradient
    return buffer.as_strided(p.shape, p.stride(), gradient.storage_offset())


def _dense(p: Tensor) -> bool:
    strides = p.stride()
    return p.permute(sorted(range(p.dim()), key=lambda i: -strides[i])).is_contiguous()


def refuse_join(config: Config, ddp: Any) -> None:
    """Raise `UnsupportedError` where ranks without data, which `ddp.join()` lets take part with zeros, would spoil what
    the others share.
    """
    if config.check_every:
        raise UnsupportedError(
            "DDP compression: in join() ranks without data take no steps, so that check_every cannot compare "
            "parameters; set check_every: 0, or give every rank the same number of batches"
        )
    if config.every > 1:
        raise UnsupportedError(
            "DDP compression: in join() ranks without data add zeros to gradients, which with every > 1 do not "
            "travel; set every: 1, or give every rank the same number of batches"
        )
    if not getattr(ddp, "_divide_by_initial_world_size", True):
        raise UnsupportedError(
            "DDP compression: join(divide_by_initial_world_size=False) divides by ranks that are still there, "
            "which no communication hook can; leave it at True"
        )
