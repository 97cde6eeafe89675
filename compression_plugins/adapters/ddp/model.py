"""What kind of DDP model can be compressed, and how its buckets hold gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

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
