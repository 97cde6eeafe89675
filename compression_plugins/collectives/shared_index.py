"""One rank's indices, everybody's values: sparse payloads that may be summed."""

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
    """Broadcast the leader's choice, then all-reduce k values: traffic is constant in the number of ranks.

    Args:
        select: on the leader, `(index payload uint8, values fp32 [k])`.
        gather: on the others, the values at the received index payload.
        placeholder: on the others, a tensor of the index payload's length.

    Returns:
        (index payload, mean of the values over ranks).
    """
    if transport.rank == leader:
        indices, values = select()
        indices = yield transport.broadcast(indices, leader)
    else:
        indices = yield transport.broadcast(placeholder(), leader)
        values = gather(indices)
    total = yield transport.all_reduce(values)
    return indices, total.div_(transport.size)
