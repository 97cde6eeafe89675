"""Numba kernels of the mergeable one-bit payloads; contracts in reference/fold.py."""

from __future__ import annotations

import numpy as np
import torch
from numba import float32, uint32, uintp

from ..checks import check_bit_pair, check_residual, draws_of, keep_left_below
from ..layout import check_buffer, check_payload, result_for, words
from ..philox import Key
from . import _philox, _tile
from ._bits import sign_mask, spread_mask
from ._jit import jit
from ._tile import TILE, load

_EVERY_DRAW = draws_of(0, 1)


def bit_merge(left: torch.Tensor, right: torch.Tensor, a: int, b: int, key: Key) -> torch.Tensor:
    check_bit_pair(left, right)
    below = keep_left_below(a, b)
    merged = torch.empty_like(left)
    _merge(*(_words(bits) for bits in (left, right, merged)), np.float32(below), _philox.words_of(key))
    return merged


def one_hot_signs(
    x: torch.Tensor, rank: int, size: int, key: Key, residual: torch.Tensor | None = None
) -> torch.Tensor:
    check_residual(x, residual)
    return _signs(x, residual, draws_of(rank, size), key)


def sign_bits(x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
    check_residual(x, residual)
    return _signs(x, residual, _EVERY_DRAW, None)


def signs_expand(
    bits: torch.Tensor,
    numel: int,
    eta: float,
    residual: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    check_payload(bits, 4 * words(numel, 1))
    if residual is not None:
        check_buffer(residual, bits, numel, "residual")
    result = result_for(out, numel, bits, accumulate=False)
    array, has_residual = _residual(residual)
    _expand(_words(bits), result.numpy(), np.float32(eta), array, has_residual)
    return result


def _words(bits: torch.Tensor) -> np.ndarray:
    return bits.view(torch.uint32).numpy()


def _residual(residual: torch.Tensor | None) -> tuple[np.ndarray, bool]:
    if residual is None:
        return np.empty(0, np.float32), False
    return residual.detach().numpy(), True


def _signs(x: torch.Tensor, residual: torch.Tensor | None, draws: tuple[int, int], key: Key | None) -> torch.Tensor:
    bits = torch.empty(4 * words(x.numel(), 1), dtype=torch.uint8)
    low, high = (np.float32(draw) for draw in draws)
    source, memory = _tile.source(x), _residual(residual)
    _encode(*source, x.numel(), *memory, _words(bits), low, high, key is not None, _philox.words_of(key))
    return bits


@jit
def _encode(x32, x16, kind, numel, r, has_r, words, low, high, has_key, key):
    """Bits of ``(p >= 0) & (low <= h < high)``, without the second term for no key."""
    p = np.empty(TILE, np.float32)
    random = np.empty(TILE // 2, np.uint32)
    draw = random.view(np.uint16)
    for start in range(0, numel, TILE):
        count = min(TILE, numel - start)
        load(x32, x16, kind, start, count, p)
        if has_r:
            _add_and_keep(p, r, start, count)
        if has_key:
            _philox.fill(random, (count + 7) // 8, start // 8, key)
            for i in range(uintp(count)):
                h = float32(draw[i])
                p[i] = p[i] if low <= h and h < high else float32(-1)
        padded = (count + 31) // 32
        for i in range(count, 32 * padded):
            p[i] = float32(-1)
        for w in range(padded):
            words[start // 32 + w] = sign_mask(p, 32 * w)


@jit
def _add_and_keep(p, r, start, count):
    start = uintp(start)
    for i in range(uintp(count)):
        p[i] = p[i] + r[start + i]
        r[start + i] = p[i]


@jit
def _merge(left, right, merged, below, key):
    margin = np.empty(TILE, np.float32)
    random = np.empty(TILE // 2, np.uint32)
    draw = random.view(np.uint16)
    for start in range(0, left.size, TILE // 32):
        count = min(TILE // 32, left.size - start)
        _philox.fill(random, 4 * count, 4 * start, key)
        for i in range(uintp(32 * count)):
            margin[i] = below - float32(1) - float32(draw[i])  # >= 0 where h < below, exact
        for w in range(count):
            a, b = left[start + w], right[start + w]
            merged[start + w] = uint32(b ^ ((a ^ b) & sign_mask(margin, 32 * w)))


@jit
def _expand(words, result, eta, r, has_r):
    tail = np.empty(32, np.float32)
    for start in range(0, result.size, TILE):
        count = min(TILE, result.size - start)
        for w in range(start // 32, (start + count) // 32):
            spread_mask(words[w], eta, -eta, result, 32 * w)
        if count % 32:
            whole = start + count - count % 32
            spread_mask(words[whole // 32], eta, -eta, tail, 0)
            result[whole : start + count] = tail[: count % 32]
        if has_r:
            for i in range(uintp(start), uintp(start + count)):
                r[i] = r[i] - result[i]
