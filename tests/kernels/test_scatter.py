"""scatter_add: sparse decode."""

from __future__ import annotations

import pytest
import torch

from compression_plugins import triton_kernels as K
from compression_plugins.errors import CompressionError

from . import sparse_checks as checks


@pytest.mark.parametrize("implementation", checks.FAST)
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("weight", [1.0, 0.3])
@pytest.mark.parametrize("numel, count", [(1, 0), (1, 1), (33, 33), (2999, 1025)])
def test_agrees_with_reference(implementation, dtype, weight, numel, count):
    checks.check_scatter(implementation, numel, count, dtype, weight)


@pytest.mark.parametrize("implementation", ("reference", *checks.FAST))
def test_adds_weighted_values_at_the_indices_only(implementation):
    device = checks.device_of(implementation)
    out = torch.arange(5.0, device=device)
    indices, values = torch.tensor([4, 1], device=device), torch.tensor([10.0, 20.0], device=device)
    checks.fast(implementation, "scatter").scatter_add(indices, values, out, 0.5)
    assert out.tolist() == [0.0, 11.0, 2.0, 3.0, 9.0]


@pytest.mark.parametrize("implementation", ("reference", "cpu"))
@pytest.mark.parametrize("bad", [-1, 4, 1 << 40])
def test_index_out_of_range_is_refused_and_nothing_is_written(implementation, bad):
    out = torch.zeros(4)
    with pytest.raises(CompressionError, match=r"\[0, 4\)"):
        checks.fast(implementation, "scatter").scatter_add(torch.tensor([0, bad]), torch.ones(2), out)
    assert not out.any()


def test_gpu_kernel_skips_an_index_out_of_range():
    device = checks.device_of("triton")
    out = torch.zeros(8, device=device)
    indices = torch.tensor([-1, 2, 4, 1 << 40], device=device)
    checks.fast("triton", "scatter").scatter_add(indices, torch.ones(4, device=device), out[:4])
    assert out.tolist() == [0, 0, 1, 0, 0, 0, 0, 0]


@pytest.mark.parametrize(
    "indices, values, out",
    [
        (torch.zeros(2), torch.zeros(2), torch.zeros(4)),
        (torch.zeros(2, dtype=torch.int64), torch.zeros(3), torch.zeros(4)),
        (torch.zeros(2, dtype=torch.int64), torch.zeros(2, dtype=torch.float16), torch.zeros(4)),
        (torch.zeros(2, dtype=torch.int64), torch.zeros(2), torch.zeros(8)[::2]),
    ],
)
def test_bad_arguments_are_refused(indices, values, out):
    with pytest.raises(CompressionError):
        K.scatter_add(indices, values, out)
