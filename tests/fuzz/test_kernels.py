"""Every kernel that reads what a peer has sent, with damaged bytes: the bodies agree, and write nowhere else."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from compression_plugins import triton_kernels as K
from compression_plugins.errors import CompressionError
from compression_plugins.triton_kernels import dispatch, layout

from .damage import CASES, damaged

BODIES = ("reference", "cpu", *(("gpu",) if torch.cuda.is_available() else ()))
GUARD = 64  # elements before and behind an output


class Guarded:
    """An output of `numel` fp32 between elements that nobody may change."""

    def __init__(self, numel: int, device: str) -> None:
        self._whole = torch.full((numel + 2 * GUARD,), 1.25, device=device)
        self.out = self._whole[GUARD : GUARD + numel]

    def kept(self) -> bool:
        return bool((self._whole[:GUARD] == 1.25).all() and (self._whole[-GUARD:] == 1.25).all())


def gradient(numel: int, dice: random.Random) -> Tensor:
    return torch.randn(numel, generator=torch.Generator().manual_seed(dice.randrange(2**31)))


def decoders(dice: random.Random) -> Iterator[tuple[str, Tensor, Callable[[Tensor, Tensor], Any]]]:
    """(name, a payload, what decodes it into an output) without end."""
    while True:
        numel = dice.choice((1, 31, 32, 33, 100, 257, 1000))
        block = dice.choice((32, 64, 1024))
        x, key = gradient(numel, dice), K.Key(dice.randrange(2**32), 1, 2, 3)
        weight, accumulate = dice.choice(((1.0, False), (0.25, True)))
        more = {"weight": weight, "accumulate": accumulate}
        yield "sign", K.sign_encode(x, block), lambda p, o, n=numel, b=block, m=more: K.sign_decode(p, n, b, out=o, **m)
        bits = dice.choice(layout.UNIFORM_BITS)
        payload = K.uniform_encode(x, bits, block, key, "absmax", "stochastic")
        yield (
            f"uniform {bits}", payload,
            lambda p, o, n=numel, b=block, w=bits, m=more: K.uniform_decode(p, n, w, b, out=o, **m),
        )  # fmt: skip
        for kind in layout.CAST_BITS:
            yield (
                kind, K.cast_encode(x, kind, block),
                lambda p, o, n=numel, b=block, k=kind, m=more: K.cast_decode(p, n, k, b, out=o, **m),
            )  # fmt: skip
        yield "expand", K.sign_bits(x), lambda p, o, n=numel: K.signs_expand(p, n, 0.5, out=o)


def same(a: Tensor, b: Tensor) -> bool:
    """Equal bits, all NaN being one."""
    return a.shape == b.shape and bool(((a == b) | (a.isnan() & b.isnan())).all())


def test_damaged_payloads_decode_alike_in_all_bodies_and_nowhere_else() -> None:
    dice = random.Random(3)
    source = decoders(dice)
    for case in range(CASES):
        name, payload, decode = next(source)
        bad = damaged(payload, dice) if case % 8 else payload
        results = []
        numel = _numel(decode)
        for body in BODIES:
            device = "cuda" if body == "gpu" else "cpu"
            guarded = Guarded(numel, device)
            guarded.out.fill_(2.0)
            with dispatch.running(body):
                decode(bad.to(device), guarded.out)
            assert guarded.kept(), f"case {case}: {name} on {body} wrote outside of its output"
            results.append(guarded.out.cpu())
        assert all(same(results[0], other) for other in results[1:]), f"case {case}: {name}: bodies differ"


def _numel(decode: Callable[..., Any]) -> int:
    return decode.__defaults__[0]  # type: ignore[attr-defined]


def test_payloads_of_another_size_are_refused_before_anything_is_read() -> None:
    dice = random.Random(4)
    source = decoders(dice)
    for _ in range(max(40, CASES // 10)):
        name, payload, decode = next(source)
        out = torch.full((_numel(decode),), 2.0)
        for wrong in (payload[:-4], payload[:-1], torch.cat([payload, payload[:4]]), payload[:0]):
            for body in ("reference", "cpu"):
                with dispatch.running(body), pytest.raises(CompressionError):
                    decode(wrong.clone(), out)
        assert bool((out == 2.0).all()), name


def test_every_code_of_fp8_decodes_alike_and_nan_stays_nan() -> None:
    """0x7F and 0xFF are NaN in e4m3; an encoder never sends them, a damaged payload may."""
    codes = torch.arange(256, dtype=torch.int32).to(torch.uint8)
    for scale in (1.0, 2.0**-130, 3e38, torch.nan, torch.inf, -0.0):
        payload = torch.cat([torch.tensor([scale] * 8).view(torch.uint8), codes])
        results = []
        for body in BODIES:
            with dispatch.running(body):
                results.append(K.cast_decode(payload.to("cuda" if body == "gpu" else "cpu"), 256, "fp8", 32).cpu())
        assert all(same(results[0], other) for other in results[1:]), scale
        assert results[0][[127, 255]].isnan().all()
        if scale == 1.0:
            assert int(results[0].isnan().sum()) == 2 and float(results[0][126]) == 448.0


def test_indices_out_of_range_name_nothing_and_are_read_and_written_nowhere() -> None:
    dice = random.Random(5)
    for case in range(max(40, CASES // 4)):
        numel, chunk = dice.choice((1, 33, 100, 257)), dice.choice((1, 7, 32, 100))
        x = gradient(numel, dice)
        indices, _ = K.chunk_select(x, chunk)
        bad = damaged(indices, dice)
        results = []
        for body in ("reference", "cpu"):
            memory = Guarded(numel, "cpu")
            memory.out.fill_(0.5)
            with dispatch.running(body):
                values = K.chunk_gather(x, bad, chunk, residual=memory.out)
            assert memory.kept(), f"case {case}: {body}"
            results.append(torch.cat([values, memory.out]))
        assert same(*results), f"case {case}: bodies differ on {bad.tolist()} in chunks of {chunk}"
        places = (bad.long() + chunk * torch.arange(len(bad))).sort().values.unique()
        sent = torch.ones(len(places))
        for body in ("reference", "cpu"):
            guarded = Guarded(numel, "cpu")
            guarded.out.zero_()
            inside = bool(((places >= 0) & (places < numel)).all())
            with dispatch.running(body):
                if inside:
                    assert int(K.scatter_add(places, sent, guarded.out).sum()) == len(places)
                else:
                    with pytest.raises(CompressionError):
                        K.scatter_add(places, sent, guarded.out)
                    assert not guarded.out.any()
            assert guarded.kept()


HUGE = [2**31 - 1, 2**31, 2**32, 2**40 + 1, 2**60, 2**63 - 32, 2**63, 2**64, -1, -32, 0]


@pytest.mark.parametrize("size", HUGE)
def test_sizes_are_bounded_before_arithmetic_can_overflow(size: int) -> None:
    """Blocks and chunks, and the numbers of elements that a decoder is told."""
    x, payload = torch.ones(40), torch.zeros(64, dtype=torch.uint8)
    key = K.Key(0, 0, 0, 0)
    legal = layout.SPAN_MAX >= size >= 1
    for body in ("reference", "cpu"):
        with dispatch.running(body):
            for call in (
                lambda: K.sign_encode(x, size), lambda: K.uniform_encode(x, 4, size, key, "absmax", "stochastic"),
                lambda: K.cast_encode(x, "fp8", size),
            ):  # fmt: skip
                if legal and size % 32 == 0:
                    call()
                else:
                    with pytest.raises(CompressionError, match="block must be"):
                        call()
            with pytest.raises(CompressionError):
                K.chunk_select(x, size) if not legal else K.chunk_select(x, 2**31)
            for call in (
                lambda: K.sign_decode(payload, size, 32), lambda: K.cast_decode(payload, size, "bf16", 32),
                lambda: K.uniform_decode(payload, size, 4, 32), lambda: K.unpack_bits(payload, size, 3),
                lambda: K.signs_expand(payload, size, 1.0), lambda: K.cast_reduce(payload.view(1, -1), size, "fp8", 32),
            ):  # fmt: skip
                with pytest.raises(CompressionError):
                    call()
