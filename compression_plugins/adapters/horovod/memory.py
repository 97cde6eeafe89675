"""What becomes of the compression memory when the ranks of an elastic job change.

What is owed to the averaged update is the mean of the ranks' memories. So each rank of a new world begins with the mean
of the old ones. A rank that dies takes its own along: a commit therefore computes the mean while all are there, by one
dense all-reduce of the memory, and survivors bring it into the new world.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from horovod.common.exceptions import HorovodInternalError
from torch import Tensor

from ...engine.saved import STATE_VERSION
from ...transports.base import Transport
from .handshake import gather_texts

#: Environment variable: `own` keeps the all-reduce out of commits; what a rank that dies had not sent is lost then.
VARIABLE = "COMPRESSION_PLUGINS_ELASTIC_MEMORY"

Vectors = Mapping[str, Mapping[str, Mapping[int, Tensor]]]


class Memory(NamedTuple):
    """A rank's memory in host memory.

    Attributes:
        state: as of `Session.state_dict`; `{}` before the first step.
        world: rank and size with which it was built, or (-1, -1).
        mean: the vectors' mean over that world, or None where it was not computed.
    """

    state: Mapping[str, Any]
    world: tuple[int, int]
    mean: dict[str, Any] | None


def average(
    transport: Transport, vectors: Vectors, slots: list[str], parameters: Mapping[str, Tensor], over: int
) -> Any:
    """The sum over ranks of `vectors` divided by `over`; parameters that a rank does not know count as zeros there."""
    device = next(iter(parameters.values())).device
    lengths = {name: p.numel() for name, p in parameters.items()}
    result: dict[str, Any] = {}
    for slot in slots:
        flat = torch.zeros(sum(lengths.values()), device=device)
        for name, whole in zip(lengths, flat.split(list(lengths.values()))):
            for start, piece in vectors.get(slot, {}).get(name, {}).items():
                whole[int(start) : int(start) + piece.numel()] = piece
        flat = transport.scoped(slot).all_reduce(flat).wait().div_(over)
        result[slot] = {name: {0: part} for name, part in zip(lengths, flat.split(list(lengths.values())))}
    return result


def mean_at_commit(transport: Transport, state: Mapping[str, Any], parameters: Mapping[str, Tensor]) -> Any:
    """The mean over ranks of the vectors of `state`, or None; every rank calls it at the same step.

    Where it fails, a rank has died: the host finds that out next, and all that is missing is the dead rank's memory.
    """
    if os.environ.get(VARIABLE) == "own" or not state:
        return None
    try:
        return average(transport, state["vectors"], sorted(state["vectors"]), parameters, transport.size)
    except HorovodInternalError:
        return None


def share_out(
    transport: Transport, held: Memory | None, step: int, parameters: Mapping[str, Tensor]
) -> tuple[dict[str, Any], bool]:
    """The memory with which every rank of a new world begins, and whether nothing of the old one is lost.

    Args:
        held: of a rank of the old world; None on one that has joined.
        step: of the old world.
    """
    mine: dict[str, Any] = {}
    if held is not None:
        layout = {
            slot: {name: [str(t.dtype).removeprefix("torch."), list(t.shape)] for name, t in named.items()}
            for slot, named in held.state.get("tensors", {}).items()
        }
        mean = None if held.mean is None else sorted(held.mean)
        mine = {"slots": sorted(held.state.get("vectors", {})), "mean": mean, "of": held.world[1], "tensors": layout}
    texts = [json.loads(text) for text in gather_texts(transport.scoped("layout"), json.dumps(mine).encode())]
    holders = [rank for rank, text in enumerate(texts) if text]
    by_mean = all(texts[rank]["mean"] is not None for rank in holders)
    slots = sorted({slot for rank in holders for slot in texts[rank]["mean" if by_mean else "slots"]})
    vectors: Vectors = {}
    if held is not None:
        vectors = (held.mean or {}) if by_mean else held.state.get("vectors", {})
    shared = average(transport.scoped("share"), vectors, slots, parameters, len(holders))
    own = {} if held is None else {slot: dict(named) for slot, named in held.state.get("tensors", {}).items()}
    tensors = broadcast(transport.scoped("tensors"), own, texts[holders[0]]["tensors"], holders[0], parameters)
    whole = by_mean or len(holders) == texts[holders[0]]["of"]
    return {"version": STATE_VERSION, "step": step, "vectors": shared, "tensors": tensors}, whole


def broadcast(
    transport: Transport,
    own: Mapping[str, Mapping[str, Tensor]],
    layout: Mapping[str, Mapping[str, Any]],
    root: int,
    parameters: Mapping[str, Tensor],
) -> dict[str, dict[str, Tensor]]:
    """Rank `root`'s tensors; `layout` says of each its dtype and shape."""
    device = next(iter(parameters.values())).device
    result: dict[str, dict[str, Tensor]] = {}
    for slot, named in layout.items():
        result[slot] = {}
        for name, (dtype, shape) in named.items():
            like = torch.empty(shape, dtype=getattr(torch, dtype), device=device)
            mine = own.get(slot, {}).get(name, like) if transport.rank == root else like
            raw = mine.to(device).contiguous().reshape(-1).view(torch.uint8)
            sent = transport.scoped(f"{slot}.{name}").broadcast(raw, root).wait()
            result[slot][name] = sent.view(like.dtype).view(like.shape)
    return result


def from_first_holder(
    transport: Transport, holder: bool, parameters: Mapping[str, Tensor], tensors: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """On every rank, what the first rank of the old world passes."""
    layout = {name: [str(t.dtype).removeprefix("torch."), list(t.shape)] for name, t in tensors.items()}
    texts = gather_texts(transport, json.dumps({"hook": layout} if holder else {}).encode())
    root, first = next((rank, json.loads(text)) for rank, text in enumerate(texts) if text != b"{}")
    return broadcast(transport, {"hook": tensors}, first, root, parameters)["hook"]
