"""Sizes near the limits of integers are refused before any arithmetic with them overflows."""

from __future__ import annotations

import pytest
import torch

from compression_plugins import triton_kernels as K
from compression_plugins.errors import CompressionError

from . import dense_checks as checks

KEY = checks.KEY
ALL = ("reference", *checks.FAST)
HUGE_SPANS = (2**31 - 32, 2**31, 2**32 + 32, 2**63 - 32, 2**63, 2**64)  # multiples of 32
HUGE_LENGTHS = (2**40 + 1, 2**59, 2**63 - 1, 2**63, 2**64, -1, -(2**63))
NONE = torch.zeros(0, dtype=torch.uint8)
SOME = torch.zeros(1, 8, dtype=torch.uint8)


@pytest.mark.parametrize("implementation", ALL)
@pytest.mark.parametrize("block", HUGE_SPANS)
@pytest.mark.parametrize(
    "call",
    [
        lambda s, u, c, b: s.sign_encode(torch.ones(64), b),
        lambda s, u, c, b: s.sign_decode(SOME[0], 32, b),
        lambda s, u, c, b: s.sign_reduce(SOME, 32, b),
        lambda s, u, c, b: u.uniform_encode(torch.ones(64), 8, b, KEY),
        lambda s, u, c, b: u.uniform_decode(SOME[0], 4, 8, b),
        lambda s, u, c, b: u.uniform_reduce(SOME, 4, 8, b, KEY),
        lambda s, u, c, b: u.uniform_average(SOME, 4, 8, b),
        lambda s, u, c, b: c.cast_encode(torch.ones(64), "fp8", b),
        lambda s, u, c, b: c.cast_decode(SOME[0], 4, "fp8", b),
        lambda s, u, c, b: c.cast_reduce(SOME, 4, "fp8", b),
    ],
)
def test_a_huge_block_is_refused(implementation, block, call):
    families = (checks.fast(implementation, family) for family in ("sign", "uniform", "cast"))
    with pytest.raises(CompressionError, match=r"^block must be at most 2147479552 \(2\*\*31 - 4096\), got \d+$"):
        call(*families, block)


@pytest.mark.parametrize("implementation", ALL)
@pytest.mark.parametrize("chunk", [2**31 - 1, *HUGE_SPANS])
def test_a_huge_chunk_is_refused(implementation, chunk):
    module = checks.fast(implementation, "chunk")
    with pytest.raises(CompressionError, match="^chunk must be .*, got"):
        module.chunk_select(torch.ones(64), chunk)
    with pytest.raises(CompressionError, match="^chunk must be .*, got"):
        module.chunk_gather(torch.ones(64), torch.zeros(1, dtype=torch.int32), chunk)


@pytest.mark.parametrize("numel", HUGE_LENGTHS)
@pytest.mark.parametrize(
    "call",
    [
        lambda n: K.sign_decode(NONE, n, 64),
        lambda n: K.sign_reduce(SOME, n, 64),
        lambda n: K.sign_vote(SOME, n),
        lambda n: K.uniform_decode(NONE, n, 8, 64),
        lambda n: K.uniform_reduce(SOME, n, 8, 64, KEY),
        lambda n: K.uniform_average(SOME, n, 8, 64),
        lambda n: K.cast_decode(NONE, n, "bf16", 64),
        lambda n: K.cast_reduce(SOME, n, "bf16", 64),
        lambda n: K.unpack_bits(NONE, n, 5),
        lambda n: K.signs_expand(NONE, n, 1.0),
        lambda n: K.signs_expand_each(NONE, torch.ones(1), [n]),
        lambda n: K.uniform16(KEY, n),
    ],
)
def test_a_length_that_no_vector_has_is_refused(numel, call):
    with pytest.raises(CompressionError, match=r"^numel must be from 0 to 1099511627776 \(2\*\*40\), got -?\d+$"):
        call(numel)


@pytest.mark.parametrize(
    "call",
    [
        lambda x: K.sign_encode(x, 64),
        lambda x: K.sign_draw(x, KEY),
        lambda x: K.uniform_encode(x, 8, 64, KEY),
        lambda x: K.cast_encode(x, "fp8", 64),
        lambda x: K.chunk_select(x, 100),
        lambda x: K.sign_bits(x),
        lambda x: K.stats(x),
    ],
)
def test_a_vector_longer_than_any_memory_is_refused(call):
    with pytest.raises(CompressionError, match=r"^x must have at most 1099511627776 \(2\*\*40\) elements, got"):
        call(torch.ones(1).expand(2**41))


@pytest.mark.parametrize("implementation", ALL)
@pytest.mark.parametrize("block", [2**20, 2**31 - 4096])
def test_a_block_longer_than_the_vector_is_one_of_its_length(implementation, block):
    x, device = checks.vector(1001), checks.device_of(implementation)
    for family, settings in (("sign", ()), ("uniform", (8,)), ("cast", ("fp8",))):
        named = {"key": KEY} if family == "uniform" else {}
        module = checks.fast(implementation, family)
        encode, decode = (getattr(module, f"{family}_{name}") for name in ("encode", "decode"))
        long, whole = (encode(x.to(device), *settings, b, **named) for b in (block, 1024))
        assert torch.equal(long, whole)
        checks.assert_same_bits(decode(long, 1001, *settings, block), decode(whole, 1001, *settings, 1024).cpu())
    module = checks.fast(implementation, "chunk")
    for ours, wanted in zip(
        module.chunk_select(x.to(device), block), module.chunk_select(x.to(device), 1001), strict=True
    ):
        checks.assert_same_bits(ours, wanted.cpu())
