"""Philox4x32-10 counter-based random numbers: the one source of randomness of every codec.

The same key gives the same numbers on every device, launch grid and rank, so a payload can be reproduced from
``(x, key)`` alone. Counter and key words are laid out as

    key      (seed, tensor)
    counter  ((offset + j) // 8, step, rank, stream)        for element j

and one 128-bit output serves eight consecutive elements with 16 bits each: element ``e = j % 8`` takes half ``e % 2``
(0 = low) of word ``e // 2``, that is, the 128 bits read as eight little-endian 16-bit integers ``h``. The uniform
variate is ``u = (h + 0.5) / 65536``, in (0, 1) and symmetric about 1/2.

Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011.

The functions here are the plain PyTorch reference; ``cpu/_philox.py`` and ``gpu/_philox.py`` are their twins.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from ..errors import CompressionError
from .layout import numel_of

MULTIPLIER_0, MULTIPLIER_1 = 0xD2511F53, 0xCD9E8D57
WEYL_0, WEYL_1 = 0x9E3779B9, 0xBB67AE85
ROUNDS = 10
MASK = 0xFFFFFFFF
LANES = 8  # elements served by one 128-bit output


class Key(NamedTuple):
    """Names one stream of random numbers. Non-negative integers; all but ``offset`` are taken modulo 2**32.

    Args:
        seed: of the run, equal on all ranks.
        tensor: id of the tensor or bucket.
        step: global training step.
        rank: whose draw it is; use one common value for draws that all ranks must share.
        stream: separates several draws for one (tensor, step, rank), for example the two stages of a collective.
        offset: index of the first element inside the stream, a multiple of 8.
    """

    seed: int
    tensor: int
    step: int
    rank: int
    stream: int = 0
    offset: int = 0

    def words(self) -> tuple[int, int, int, int, int, int]:
        """``(seed, tensor, first counter, step, rank, stream)`` as unsigned 32-bit words, checked."""
        seed, tensor, step, rank, stream, offset = map(int, self)
        if min(self) < 0:
            raise CompressionError(f"a Philox key is made of non-negative integers, got {self}")
        if offset % LANES:
            raise CompressionError(f"the offset of a Philox key must be a multiple of {LANES}, got {offset}")
        return seed & MASK, tensor & MASK, offset // LANES & MASK, step & MASK, rank & MASK, stream & MASK


def philox4x32(counter: torch.Tensor, key: tuple[int, int]) -> torch.Tensor:
    """Philox4x32-10 of ``counter`` (int64, shape [4, m], values below 2**32) under two key words -> int64 [4, m]."""
    c0, c1, c2, c3 = counter.unbind(0)
    k0, k1 = key
    for _ in range(ROUNDS):
        # A signed 64-bit product wraps to the right bit pattern; masking after the shift undoes its sign extension.
        product_0, product_1 = c0 * MULTIPLIER_0, c2 * MULTIPLIER_1
        high_0, high_1 = (product_0 >> 32) & MASK, (product_1 >> 32) & MASK
        c0, c1, c2, c3 = high_1 ^ c1 ^ k0, product_1 & MASK, high_0 ^ c3 ^ k1, product_0 & MASK
        k0, k1 = (k0 + WEYL_0) & MASK, (k1 + WEYL_1) & MASK
    return torch.stack((c0, c1, c2, c3))


def uniform16(key: Key, numel: int, device: torch.device | str | None = None) -> torch.Tensor:
    """The 16 random bits ``h`` of elements 0..numel-1 -> int32 [numel], values in [0, 65536).

    Raises:
        CompressionError: ``numel`` is negative or above 2**40, or the key is no key.
    """
    numel_of(numel)
    seed, tensor, first, step, rank, stream = key.words()
    index = (torch.arange(-(-numel // LANES), dtype=torch.int64, device=device) + first) & MASK
    counter = torch.stack([index] + [torch.full_like(index, word) for word in (step, rank, stream)])
    words = philox4x32(counter, (seed, tensor))
    halves = torch.stack((words & 0xFFFF, words >> 16), dim=1)  # [4 words, 2 halves, m]
    return halves.permute(2, 0, 1).reshape(-1)[:numel].to(torch.int32)


def signed32(key: Key, numel: int, device: torch.device | str | None = None) -> torch.Tensor:
    """32 random bits per element, read as a signed integer: those of elements 2j (low) and 2j + 1 of `uniform16` under
    twice the offset -> int32 [numel].
    """
    halves = uniform16(key._replace(offset=2 * key.offset), 2 * numel, device).long().view(numel, 2)
    return (halves[:, 0] | halves[:, 1] << 16).to(torch.int32)


def uniform(key: Key, numel: int, device: torch.device | str | None = None) -> torch.Tensor:
    """Uniform variates ``(h + 0.5) / 65536`` -> float32 [numel], exact."""
    return (uniform16(key, numel, device).to(torch.float32) + 0.5) / 65536.0
