"""Memory that goes elsewhere: a step that is thrown away leaves the old memory as it was."""

from __future__ import annotations

import inspect

import pytest
import torch

from compression_plugins import triton_kernels as K
from compression_plugins.errors import CompressionError
from compression_plugins.triton_kernels import ops

from . import dense_checks, memory_checks
from .sparse_checks import FAST, device_of, vector

ALL = ("reference", *FAST)

# NumPy, on which Triton's interpreter runs, warns where a kernel computes with lanes that it does not store.
pytestmark = [
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter"),
    pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning"),
]


def test_every_kernel_that_updates_a_memory_is_here():
    takes = {name for name, front in ops.FUNCTIONS.items() if "updated" in inspect.signature(front).parameters}
    reads = {name for name, front in ops.FUNCTIONS.items() if "residual" in inspect.signature(front).parameters}
    assert takes == reads - {"stats"} == {function for _, function, _ in memory_checks.CALLS.values()}


@pytest.mark.parametrize("implementation", ALL)
@pytest.mark.parametrize("call", memory_checks.CALLS)
@pytest.mark.parametrize("factors", memory_checks.FACTORS, ids=("plain", "damped"))
@pytest.mark.parametrize("numel", [0, 1, 33, 9001])
def test_memory_that_goes_elsewhere_is_the_one_in_place(implementation, call, factors, numel):
    memory_checks.check_updated(implementation, call, numel, factors)


@pytest.mark.parametrize("implementation", ALL)
@pytest.mark.parametrize("call", [name for name, (family, *_) in memory_checks.CALLS.items() if family != "fold"])
def test_a_block_that_is_not_finite_copies_its_old_memory(implementation, call):
    x, old = vector(300), vector(300, seed=1)
    x[:] = float("nan")
    device = device_of(implementation)
    updated = torch.full((300,), 7e7, device=device)
    memory_checks.run(implementation, call, x, (0.3, 0.9, 0.7), residual=old.to(device), updated=updated)
    dense_checks.assert_same_bits(updated, old)


def test_updated_without_residual_is_refused():
    with pytest.raises(CompressionError, match="updated= needs residual="):
        K.sign_encode(torch.ones(64), 64, updated=torch.ones(64))


@pytest.mark.parametrize("first, second", [(0, 1), (1, 0), (0, 63)])
def test_a_partial_overlap_is_refused(first, second):
    buffer = torch.zeros(128)
    with pytest.raises(CompressionError, match="or not overlap it"):
        K.sign_encode(torch.ones(64), 64, buffer[first : first + 64], updated=buffer[second : second + 64])
    K.sign_encode(torch.ones(64), 64, buffer[:64], updated=buffer[64:])  # neighbours are two memories


@pytest.mark.parametrize("bad", [torch.zeros(63), torch.zeros(64, dtype=torch.float16), torch.zeros(128)[::2]])
def test_updated_is_checked_like_residual(bad):
    with pytest.raises(CompressionError, match="updated must be a contiguous 1-D fp32 tensor of 64"):
        K.sign_encode(torch.ones(64), 64, torch.zeros(64), updated=bad)
