"""Exchanges of payloads: an all-gather, or in two stages with decode-average-encode at the owners of shards."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from .shards import decode_shards, encode_shards, even_shards

if TYPE_CHECKING:
    from torch import Tensor

    from ..codecs import Codec
    from ..memories import Memory
    from ..schemes.base import Call, Reduction

_SECOND_STAGE = 1 << 16  # random stream of the owners' encode, apart from the streams that adapters count in
#: Bytes more that a rank sends rather than wait for a second round: what 1 Gb/s carries in a millisecond, which a round
#: of Horovod takes at least.
_WORTH_A_ROUND = 1 << 17


def in_one_round(nbytes: int, size: int) -> bool:
    """Are payloads of `nbytes` gathered, not reduced by owners? Always between two ranks, where both send as much."""
    return (size - 1) * (size - 2) * nbytes <= size * _WORTH_A_ROUND


def two_stage(codec: Codec, memory: Memory | None, call: Call, x: Tensor) -> Reduction:
    """2·b bits an element whatever the number of ranks; every rank decodes the same bytes, so all end with the same
    bits.

    The owner of a shard averages in fp32 and encodes once more, so the codec should be unbiased or nearly exact.
    When the host wants only its shard (`call.shards`), the second stage is left out: see `reduce_scatter`. Short
    payloads are gathered, in one round and rounded once: see `in_one_round`.
    """
    size = call.transport.size
    if call.shards is not None or in_one_round(codec.nbytes(x.numel()), size):
        return (yield from gather(codec, memory, call, x))
    shards = even_shards(x.numel(), size, codec.block)
    inbox = yield from _to_owners(codec, memory, call, x, shards)
    own = shards[call.transport.rank]
    slot = inbox.new_zeros(codec.nbytes(max(shards)))
    if own:
        key = call.key._replace(stream=call.key.stream + _SECOND_STAGE)
        slot[: codec.nbytes(own)] = codec.reduce(inbox, own, key)
    outbox = yield call.transport.all_gather(slot)
    return decode_shards(codec, outbox, shards, x)


def gather(codec: Codec, memory: Memory | None, call: Call, x: Tensor) -> Reduction:
    """Everyone decodes everyone's message: one rounding and exact error feedback, at (n-1)·b bits an element."""
    if call.shards is not None:
        return (yield from reduce_scatter(codec, memory, call, x))
    payload = codec.encode(x, call.key, memory, call.residual() if memory else None)
    payloads = yield call.transport.all_gather(payload)
    return codec.average(payloads, x.numel(), x)


def reduce_scatter(codec: Codec, memory: Memory | None, call: Call, x: Tensor) -> Reduction:
    """One all-to-all: each owner decodes and averages its shard; b bits an element, one rounding, any codec."""
    assert call.shards is not None
    inbox = yield from _to_owners(codec, memory, call, x, call.shards)
    mine = x.split(list(call.shards))[call.transport.rank]
    codec.average(inbox, mine.numel(), mine)
    return x


def _to_owners(codec: Codec, memory: Memory | None, call: Call, x: Tensor, shards: Sequence[int]) -> Reduction:
    """Send every owner its shard of `x`; the payloads received for the own shard, uint8 [size, nbytes]."""
    lengths = [codec.nbytes(n) for n in shards]
    outbox = encode_shards(codec, x, shards, call.key, memory, call.residual() if memory else None)
    mine = lengths[call.transport.rank]
    inbox = yield call.transport.all_to_all(outbox, lengths, [mine] * call.transport.size)
    return inbox.view(call.transport.size, mine)
