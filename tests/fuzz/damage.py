"""Ways in which bytes get damaged, and a transport on which they do.

`COMPRESSION_PLUGINS_FUZZ_CASES` is how many cases each test tries: some hundreds unless it says otherwise, 100,000 in a
nightly run.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from compression_plugins.transports.base import Handle, Then, Transport

CASES = int(os.environ.get("COMPRESSION_PLUGINS_FUZZ_CASES", "300"))
#: Words that are extreme as an index, as a size and as an fp32: -1 and NaN, the largest, the smallest, Inf, NaN.
WORDS = (0xFFFFFFFF, 0x7FFFFFFF, 0x80000000, 0x7F800000, 0xFF800000, 0x7FC00000, 0x00000001, 0x7F7FFFFF)


def damaged(x: Tensor, dice: random.Random) -> Tensor:
    """A copy of `x`, any dtype and shape, with some bytes changed."""
    data = x.contiguous().view(-1).view(torch.uint8).clone()
    if not len(data):
        return x.clone()
    how = dice.randrange(5)
    if how == 0:
        data[dice.randrange(len(data))] ^= 1 << dice.randrange(8)
    elif how == 1:
        start = dice.randrange(len(data))
        stop = min(len(data), start + dice.randrange(1, 64))
        data[start:stop] = torch.tensor(list(dice.randbytes(stop - start)), dtype=torch.uint8)
    elif how == 2:
        data.copy_(torch.frombuffer(bytearray(dice.randbytes(len(data))), dtype=torch.uint8))
    elif len(data) >= 4:
        words = data[: len(data) // 4 * 4].view(torch.int32)
        value = dice.choice(WORDS)
        value -= (value >> 31) << 32
        if how == 3:
            words[dice.randrange(len(words))] = value
        else:
            words.fill_(value)
    return data.view(x.dtype).view(x.shape)


class Damaging(Transport):
    """`inner`, of whose received messages `change` makes others.

    Args:
        change: what becomes of a result, called with it and the kind of operation.
    """

    def __init__(self, inner: Transport, change: Callable[[Tensor, str], Tensor]) -> None:
        super().__init__()
        self._inner, self._change = inner, change
        self.rank, self.size, self.ordered = inner.rank, inner.size, inner.ordered

    def scoped(self, name: str) -> Damaging:
        return Damaging(self._inner.scoped(name), self._change)

    def subgroup(self, ranks: Sequence[int]) -> Damaging:
        return Damaging(self._inner.subgroup(ranks), self._change)

    def _changed(self, handle: Handle, kind: str) -> Handle:
        return Then(handle, lambda result: self._change(result, kind))

    def _all_reduce(self, x: Tensor) -> Handle:
        return self._changed(self._inner.all_reduce(x), "all_reduce")

    def _all_gather(self, x: Tensor) -> Handle:
        return self._changed(self._inner.all_gather(x), "all_gather")

    def _all_to_all(self, x: Tensor, send: Sequence[int], receive: Sequence[int]) -> Handle:
        return self._changed(self._inner.all_to_all(x, send, receive), "all_to_all")

    def _broadcast(self, x: Tensor, root: int) -> Handle:
        return self._changed(self._inner.broadcast(x, root), "broadcast")

    def _send_recv(self, x: Tensor, to: int, source: int, receive: int | None) -> Handle:
        return self._changed(self._inner.send_recv(x, to, source, receive), "send_recv")
