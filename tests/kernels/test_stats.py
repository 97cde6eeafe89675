"""Whole-tensor statistics: largest magnitude exact, sums within one fp32 ulp of fp64."""

from __future__ import annotations

import pytest
import torch

from compression_plugins import triton_kernels as K
from compression_plugins.errors import CompressionError

from . import dense_checks as checks

ALL = ("reference", *checks.FAST)


@pytest.mark.parametrize("implementation", ALL)
@pytest.mark.parametrize("alpha", [None, 0.3])
@pytest.mark.parametrize("numel", [0, 1, 33, 4096, 4097, 9001])
def test_statistics_of_the_compensated_vector(implementation, alpha, numel):
    checks.check_stats(implementation, numel, alpha)


@pytest.mark.parametrize("implementation", ALL)
@pytest.mark.parametrize("dtype, stride", checks.INPUTS)
def test_any_float_dtype_and_stride_is_read(implementation, dtype, stride):
    checks.check_stats(implementation, 1009, 0.3, dtype, stride)


@pytest.mark.parametrize("implementation", ALL)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_non_finite_element_makes_all_three_nan(implementation, bad):
    x = torch.ones(5000)
    x[4999] = bad
    assert checks.fast(implementation, "stats").stats(x.to(checks.device_of(implementation))).isnan().all()


@pytest.mark.parametrize("implementation", ALL)
def test_sums_of_huge_numbers_are_carried_in_fp64(implementation):
    x = torch.full((100,), 1e18).to(checks.device_of(implementation))
    x[0] = -1e30
    result = checks.fast(implementation, "stats").stats(x).tolist()
    assert result[0] == pytest.approx(1e30) and result[1] == pytest.approx(1e30)
    assert result[2] == float("inf")  # 1e60 is beyond fp32


def test_a_lazily_negated_view_is_refused():
    with pytest.raises(CompressionError, match="resolve_neg"):
        K.stats(torch.complex(torch.ones(8), torch.ones(8)).conj().imag)
