"""chunk, fold and scatter on a real GPU, compiled: bit for bit the reference, at sizes of real gradients."""

from __future__ import annotations

import pytest
import torch

from compression_plugins import triton_kernels as K
from tests.kernels import sparse_checks as checks

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

LARGE = 3_000_017


@pytest.mark.parametrize("memory", checks.MEMORIES, ids=("none", "plain", "damped"))
@pytest.mark.parametrize("dtype, stride", checks.INPUTS)
@pytest.mark.parametrize("chunk", [1, 3, 100, 112, 4096, 5000, 10**6])
def test_chunks_agree_with_reference(memory, dtype, stride, chunk):
    checks.check_chunk("triton", LARGE, chunk, memory, dtype, stride)
    checks.check_chunk("triton", 2999, chunk, memory, dtype, stride, spoil=False)


@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("dtype, stride", checks.INPUTS)
@pytest.mark.parametrize("numel", [1, 33, 2999, LARGE])
def test_signs_agree_with_reference(with_residual, dtype, stride, numel):
    checks.check_fold("triton", numel, dtype, stride, with_residual)


@pytest.mark.parametrize("a, b", [(1, 1), (2, 1), (3, 1), (2, 2)])
def test_merge_agrees_with_reference(a, b):
    checks.check_merge("triton", LARGE, a, b)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_scatter_agrees_with_reference(dtype):
    checks.check_scatter("triton", LARGE, 30_011, dtype, weight=0.3)


def test_results_do_not_depend_on_the_launch():
    """A vector and its parts, at their offsets, give the same bits: nothing depends on which program saw an element."""
    x, residual = torch.randn(1 << 20, device="cuda"), torch.randn(1 << 20, device="cuda")
    cut = 1 << 18
    whole, parts = residual.clone(), residual.clone()
    bits = K.one_hot_signs(x, 2, 5, checks.KEY, whole)
    tail = K.one_hot_signs(x[cut:], 2, 5, checks.KEY._replace(offset=checks.KEY.offset + cut), parts[cut:])
    assert torch.equal(bits[cut // 8 :], tail) and torch.equal(whole[cut:], parts[cut:])
    indices, values = K.chunk_select(x, 128, whole)
    some = K.chunk_select(x[cut:], 128, parts[cut:])
    assert torch.equal(indices[cut // 128 :], some[0]) and torch.equal(values[cut // 128 :], some[1])


def test_elements_beyond_two_to_the_31_are_reached():
    numel = (1 << 31) + 129
    if torch.cuda.mem_get_info()[0] < 3 * 2 * numel:
        pytest.skip("needs 13 GB of free GPU memory")
    x = torch.zeros(numel, dtype=torch.bfloat16, device="cuda")
    x[-1] = -1.0
    indices, values = K.chunk_select(x, 128)
    assert indices[-1] == 0 and values[-1] == -1.0 and values.count_nonzero() == 1
    bits = K.sign_bits(x).cpu()
    assert bits[-4:].tolist() == [0, 0, 0, 0] and bits[-5] == 255
