"""chunk_select and chunk_gather: the law of the reference, and that the fast kernels are the reference, bit for bit."""

from __future__ import annotations

import pytest
import torch

from compression_plugins import triton_kernels as K
from compression_plugins.errors import CompressionError

from . import sparse_checks as checks

# The interpreter computes Inf - Inf in lanes whose store is masked.
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")

CHUNK = 100
NAN = float("nan")


@pytest.mark.parametrize("implementation", checks.FAST)
@pytest.mark.parametrize("memory", checks.MEMORIES, ids=("none", "plain", "damped"))
@pytest.mark.parametrize("dtype, stride", checks.INPUTS)
@pytest.mark.parametrize("numel", [0, 1, 7, 33, CHUNK - 1, CHUNK, CHUNK + 1, 2999])
def test_agrees_with_reference(implementation, memory, dtype, stride, numel):
    checks.check_chunk(implementation, numel, CHUNK, memory, dtype, stride)


@pytest.mark.parametrize("implementation", checks.FAST)
@pytest.mark.parametrize("chunk", [1, 2, 3, 8, 112, 128, 4095, 4096, 4097, 20_000])
def test_agrees_with_reference_for_any_chunk(implementation, chunk):
    checks.check_chunk(implementation, 9001, chunk, (0.3, 0.9, 0.7))
    checks.check_chunk(implementation, 9001, chunk, spoil=False)


def test_selects_the_largest_magnitude_of_every_chunk():
    x = torch.randn(1003, generator=torch.Generator().manual_seed(0))
    indices, values = K.chunk_select(x, 10)
    for c, part in enumerate(x.split(10)):
        assert indices[c] == part.abs().argmax() and values[c] == part[part.abs().argmax()]


@pytest.mark.parametrize("implementation", ("reference", *checks.FAST))
@pytest.mark.parametrize("chunk, sign", [(64, 1), (5000, -1)])
def test_ties_go_to_the_lowest_index(implementation, chunk, sign):
    x = torch.zeros(2 * chunk)
    x[[7, 9, chunk - 1]] = torch.tensor([2.0, -2.0, 2.0]) * sign
    device = checks.device_of(implementation)
    indices, values = checks.fast(implementation, "chunk").chunk_select(x.to(device), chunk)
    assert indices.tolist() == [7, 0] and values.tolist() == [2.0 * sign, 0.0]


@pytest.mark.parametrize("implementation", ("reference", *checks.FAST))
@pytest.mark.parametrize("bad", [NAN, float("inf"), float("-inf")])
def test_chunk_with_non_finite_value_sends_nan_and_keeps_its_residual(implementation, bad):
    x, residual = checks.vector(30), checks.vector(30, seed=1)
    x[14] = bad
    device = checks.device_of(implementation)
    for given in (False, True):
        r = residual.to(device, copy=True)
        module = checks.fast(implementation, "chunk")
        if given:
            values = module.chunk_gather(x.to(device), torch.zeros(3, dtype=torch.int32, device=device), 10, r)
        else:
            indices, values = module.chunk_select(x.to(device), 10, r)
            assert indices[1] == 0
        assert values.isnan().tolist() == [False, True, False]
        assert torch.equal(r[10:20].cpu(), residual[10:20])
        assert not torch.equal(r[:10].cpu(), residual[:10]) and not torch.equal(r[20:].cpu(), residual[20:])


def test_overflow_of_the_compensated_value_counts_as_non_finite():
    x, residual = torch.full((4,), 3e38), torch.full((4,), 3e38)
    _, values = K.chunk_select(x, 2, residual)
    assert values.isnan().all() and torch.equal(residual, torch.full((4,), 3e38))


def test_what_is_sent_plus_what_is_remembered_is_what_came_in():
    x, residual = checks.vector(1234), checks.vector(1234, seed=1)
    p = x + residual
    indices, values = K.chunk_select(x, 100, residual)
    position = indices.long() + 100 * torch.arange(13)
    assert torch.equal(residual[position], torch.zeros(13))
    assert torch.equal(K.scatter_add(position, values, residual.clone()), p)


def test_index_beyond_a_short_last_chunk_sends_zero_and_remembers_all():
    x, residual = checks.vector(25), checks.vector(25, seed=1)
    p = x + residual
    values = K.chunk_gather(x, torch.tensor([0, 9, 5], dtype=torch.int32), 10, residual)
    assert values.tolist() == [p[0], p[19], 0.0]
    assert torch.equal(residual[20:], p[20:])


@pytest.mark.parametrize("implementation", checks.FAST)
@pytest.mark.parametrize("index", [-1, 10, 1 << 30])
def test_foreign_index_touches_no_other_chunk(implementation, index):
    checks.both(
        "chunk", "chunk_gather", implementation, (checks.vector(30), torch.full((3,), index, dtype=torch.int32)), 10,
        residual=checks.vector(30, seed=1),
    )  # fmt: skip


def test_gather_at_own_indices_is_select():
    """With one rank, the shared-index method is top-1-of-chunk with error feedback."""
    x, r1, r2 = checks.vector(999), checks.vector(999, seed=1), checks.vector(999, seed=1)
    indices, values = K.chunk_select(x, 50, r1, 0.1)
    assert torch.equal(K.chunk_gather(x, indices, 50, r2, 0.1), values) and torch.equal(r1, r2)


def test_gather_at_shared_indices_commutes_with_summation():
    ranks = [checks.vector(640, seed=seed) for seed in range(4)]  # multiples of 1/4: sums are exact
    indices, _ = K.chunk_select(ranks[2], 64)
    gathered = sum(K.chunk_gather(x, indices, 64) for x in ranks)
    assert torch.equal(gathered, K.chunk_gather(sum(ranks), indices, 64))


def test_damped_memory_telescopes():
    """ScaleCom's low-pass filter in units of m / beta: sum of what was sent is sum of gradients minus the residual."""
    residual, total, sent = torch.zeros(600), torch.zeros(600), torch.zeros(600)
    offsets = 50 * torch.arange(12)
    for step in range(20):
        x = checks.vector(600, seed=step)
        indices, values = K.chunk_select(x, 50, residual, alpha=0.125)
        K.scatter_add(indices.long() + offsets, values, sent)
        total += x
    assert torch.allclose(sent + residual, total, atol=1e-4) and residual.abs().sum() > 0


@pytest.mark.parametrize("implementation", ("reference", *checks.FAST))
@pytest.mark.parametrize(
    "change",
    [
        {"chunk": 0},
        {"x": torch.zeros(2, 3)},
        {"x": torch.zeros(6, dtype=torch.float64)},
        {"residual": torch.zeros(5)},
        {"residual": torch.zeros(6, dtype=torch.float16)},
        {"residual": torch.zeros(12)[::2]},
        {"indices": torch.zeros(3, dtype=torch.int32)},
        {"indices": torch.zeros(2, dtype=torch.int64)},
    ],
)
def test_bad_arguments_are_refused(implementation, change):
    arguments = {"x": torch.zeros(6), "indices": torch.zeros(2, dtype=torch.int32), "chunk": 3, **change}
    device = checks.device_of(implementation)
    for name, value in arguments.items():
        if isinstance(value, torch.Tensor) and value.is_contiguous():
            arguments[name] = value.to(device)
    module = checks.fast(implementation, "chunk")
    with pytest.raises(CompressionError):
        module.chunk_gather(**arguments)
    if "indices" not in change:
        arguments.pop("indices")
        with pytest.raises(CompressionError):
            module.chunk_select(**arguments)
