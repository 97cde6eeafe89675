"""One rank's indices, everybody's values: what all ranks send has the same places, so it may be averaged as it is."""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from ..transports.base import Handle, Transport


def shared_index(
    transport: Transport,
    leader: int,
    select: Callable[[], tuple[Tensor, Tensor]],
    gather: Callable[[Tensor], Tensor],
    placeholder: Callable[[], Tensor],
) -> Generator[Handle, Any, tuple[Tensor, Tensor]]:
    """Broadcast the leader's choice, and look it up on every rank.

    The k values that come back fill the same places everywhere. A dense mean of them (`dense_mean`, `half_mean`) is the
    sparse mean, at a traffic that does not grow with the number of ranks.

    Args:
        select: on the leader, `(index payload uint8, values fp32 [k])`.
        gather: on the others, the values at the received index payload.
        placeholder: on the others, a tensor of the index payload's length.

    Returns:
        (index payload, this rank's values, fp32 [k]).
    """
    if transport.rank == leader:
        indices, values = select()
        indices = yield transport.broadcast(indices, leader)
    else:
        indices = yield transport.broadcast(placeholder(), leader)
        values = gather(indices)
    return indices, values
