"""The checks of tests/kernels, on a GPU and at the sizes that Triton's interpreter is too slow for."""

from __future__ import annotations

import pytest
import torch

from tests.kernels import dense_checks as checks
from tests.kernels import memory_checks

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device: torch.cuda.is_available() is false"),
]

LENGTHS = (0, 1, 7, 8, 31, 33, 511, 512, 513, 100_003)
MEMORIES = pytest.mark.parametrize("memory", checks.MEMORIES.values(), ids=checks.MEMORIES)
DAMPED = checks.MEMORIES["damped"]


@MEMORIES
@pytest.mark.parametrize("dtype, stride", checks.INPUTS)
@pytest.mark.parametrize("numel", LENGTHS)
def test_sign(memory, dtype, stride, numel):
    checks.check_sign("triton", numel, 512, memory, dtype, stride)


@pytest.mark.parametrize("bits", [2, 4, 8, 16])
@pytest.mark.parametrize("scale", ["absmax", "l2"])
@pytest.mark.parametrize("rounding", ["stochastic", "nearest"])
@pytest.mark.parametrize("numel", LENGTHS)
def test_uniform(bits, scale, rounding, numel):
    checks.check_uniform("triton", numel, bits, 512, scale, rounding, DAMPED)


@MEMORIES
@pytest.mark.parametrize("dtype, stride", checks.INPUTS)
@pytest.mark.parametrize("numel", LENGTHS)
def test_uniform_of_any_dtype_and_memory(memory, dtype, stride, numel):
    checks.check_uniform("triton", numel, 8, 512, "absmax", "stochastic", memory, dtype, stride)


@pytest.mark.parametrize("bits", [2, 4, 8, 16])
@pytest.mark.parametrize("numel", LENGTHS)
def test_uniform_round(bits, numel):
    checks.check_round("triton", numel, bits)


@MEMORIES
@pytest.mark.parametrize("kind", ["bf16", "fp16", "fp8"])
@pytest.mark.parametrize("dtype, stride", checks.INPUTS)
@pytest.mark.parametrize("numel", LENGTHS)
def test_cast(memory, kind, dtype, stride, numel):
    checks.check_cast("triton", numel, kind, 512, memory, dtype, stride)


@pytest.mark.parametrize("block", [32, 96, 4096, 4128, 100_032])
def test_any_block(block):
    checks.check_sign("triton", 100_003, block, DAMPED)
    checks.check_uniform("triton", 100_003, 8, block, "absmax", "stochastic", DAMPED)
    checks.check_uniform("triton", 100_003, 4, block, "l2", "stochastic", DAMPED)
    checks.check_cast("triton", 100_003, "fp8", block, DAMPED)


@pytest.mark.parametrize("family, kind", [("sign", None), ("uniform", None)] + [("cast", k) for k in ("bf16", "fp8")])
@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
@pytest.mark.parametrize("numel, block", [(1, 512), (100_003, 512), (100_003, 5024)])
def test_reduce(family, kind, ranks, numel, block):
    checks.check_reduce(family, "triton", numel, block, ranks, kind)


@pytest.mark.parametrize("numel", LENGTHS)
def test_vote_stats_and_pack(numel):
    checks.check_vote("triton", numel, 5)
    checks.check_stats("triton", numel, 0.3)
    for width in range(1, 17):
        checks.check_pack("triton", min(numel, 3001), width)


@pytest.mark.parametrize("dtype, stride", checks.INPUTS)
@pytest.mark.parametrize("numel", LENGTHS)
def test_draw(dtype, stride, numel):
    checks.check_draw("triton", numel, dtype, stride)
    checks.check_draw("triton", numel, dtype, stride, spoil=True)


@pytest.mark.parametrize("factors", memory_checks.FACTORS)
@pytest.mark.parametrize("call", memory_checks.CALLS)
@pytest.mark.parametrize("numel", [1, 511, 513, 100_003])
def test_memory_that_goes_elsewhere_is_the_one_in_place(call, factors, numel):
    memory_checks.check_updated("triton", call, numel, factors)


def test_indices_beyond_two_to_the_31():
    """The last block of a 2**31 + 512 element vector is encoded from its own elements, with its own random numbers."""
    free, _ = torch.cuda.mem_get_info()
    if free < 16 << 30:
        pytest.skip(f"needs 16 GiB of free GPU memory, has {free >> 30}")
    numel, tail = 2**31 + 512, checks.vector(512)
    x = torch.zeros(numel, dtype=torch.float16, device="cuda")
    x[-512:] = tail.to(x)
    module, key = checks.fast("triton", "uniform"), checks.KEY
    payload = module.uniform_encode(x, 8, 512, key)
    alone = checks.reference("uniform").uniform_encode(tail, 8, 512, key._replace(offset=key.offset + 2**31))
    assert torch.equal(payload[-512:].cpu(), alone[-512:])
