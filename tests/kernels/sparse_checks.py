"""Agreement of chunk, fold and scatter with their references: run on the CPU by tests/kernels, on CUDA by tests/gpu."""

from __future__ import annotations

import functools
from types import SimpleNamespace

import torch

from compression_plugins.triton_kernels import Key, dispatch, ops

FAST = ("cpu", "triton")
MEMORIES = (None, (1.0, 1.0, 1.0), (0.3, 0.9, 0.7))  # (alpha, decay, sent)
INPUTS = ((torch.float32, 1), (torch.float32, 2), (torch.float16, 1), (torch.bfloat16, 3))  # (dtype, stride)
KEY = Key(seed=7, tensor=11, step=13, rank=17, stream=1, offset=64)


def fast(implementation: str, family: str) -> SimpleNamespace:
    """The public functions of a family, run by the implementation that is named."""

    def forced(name):
        @functools.wraps(ops.FUNCTIONS[name])
        def call(*args, **kwargs):
            with dispatch.running(implementation):
                return ops.FUNCTIONS[name](*args, **kwargs)

        return call

    return SimpleNamespace(**{name: forced(name) for name, other in ops.FAMILY_OF.items() if other == family})


reference = functools.partial(fast, "reference")


def device_of(implementation: str) -> str:
    """Triton runs on the GPU where there is one, else in its interpreter on CPU tensors."""
    return "cuda" if implementation == "triton" and torch.cuda.is_available() else "cpu"


def vector(numel: int, dtype: torch.dtype = torch.float32, stride: int = 1, seed: int = 0) -> torch.Tensor:
    """Gaussian on a coarse grid, so that ties, zeros and negative zeros occur; ``stride`` apart in its buffer."""
    generator = torch.Generator().manual_seed(seed)
    buffer = torch.randn(numel * stride, generator=generator).mul_(8).round_().div_(4)
    return buffer.to(dtype)[::stride]


def random_bits(numel: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (4 * -(-numel // 32),), generator=generator, dtype=torch.uint8)


def assert_same_bits(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal bit for bit, -0.0 and 0.0 apart; any two NaN are equal."""
    actual = actual.cpu()
    assert actual.dtype == expected.dtype and actual.shape == expected.shape
    if actual.dtype == torch.float32:
        assert torch.equal(actual.isnan(), expected.isnan())
        actual, expected = (torch.where(v.isnan(), 0.0, v).view(torch.int32) for v in (actual, expected))
    assert torch.equal(actual, expected)


def both(family: str, function: str, implementation: str, tensors: tuple, *args, residual=None, **kwargs) -> None:
    """Runs ``function`` in both implementations: results and residuals are equal."""
    device = device_of(implementation)
    ours, theirs = (None if residual is None else residual.clone() for _ in range(2))
    ours = None if ours is None else ours.to(device)
    memory = ({}, {}) if residual is None else ({"residual": theirs}, {"residual": ours})
    expected = getattr(reference(family), function)(*tensors, *args, **memory[0], **kwargs)
    actual = getattr(fast(implementation, family), function)(
        *(tensor.to(device) for tensor in tensors), *args, **memory[1], **kwargs
    )
    pairs = zip(actual, expected, strict=True) if isinstance(expected, tuple) else [(actual, expected)]
    for mine, wanted in pairs:
        assert_same_bits(mine, wanted)
    if residual is not None:
        assert_same_bits(ours, theirs)


def check_chunk(implementation: str, numel: int, chunk: int, memory=None, dtype=torch.float32, stride=1, spoil=True):
    """``chunk_select`` and ``chunk_gather`` agree with the reference, chunks with NaN and Inf included."""
    x = vector(numel, dtype, stride)
    if spoil and numel > 8:
        x[5], x[numel // 2], x[-1] = float("nan"), float("-inf"), float("inf")
    residual = None if memory is None else vector(numel, seed=1)
    factors = {} if memory is None else dict(zip(("alpha", "decay", "sent"), memory, strict=True))
    both("chunk", "chunk_select", implementation, (x,), chunk, residual=residual, **factors)
    generator = torch.Generator().manual_seed(2)
    indices = torch.randint(0, chunk, (-(-numel // chunk),), generator=generator, dtype=torch.int32)
    both("chunk", "chunk_gather", implementation, (x, indices), chunk, residual=residual, **factors)


def check_fold(implementation: str, numel: int, dtype=torch.float32, stride=1, with_residual=False) -> None:
    """The three functions of the one-bit payloads agree with the reference, NaN included."""
    x = vector(numel, dtype, stride)
    if numel > 8:
        x[3] = float("nan")
    residual = vector(numel, seed=1) if with_residual else None
    both("fold", "sign_bits", implementation, (x,), residual=residual)
    both("fold", "one_hot_signs", implementation, (x,), 1, 3, KEY, residual=residual)
    both("fold", "signs_expand", implementation, (random_bits(numel, 3),), numel, 0.1, residual=residual)
    sizes = [numel // 3, 0, min(numel, 1), numel - numel // 3 - min(numel, 1)] if numel > 1 else [numel]
    etas = vector(len(sizes), seed=2).abs()
    both("fold", "signs_expand_each", implementation, (random_bits(numel, 3), etas), sizes, residual=residual)


def check_merge(implementation: str, numel: int, a: int, b: int) -> None:
    both("fold", "bit_merge", implementation, (random_bits(numel, 4), random_bits(numel, 5)), a, b, KEY)


def check_scatter(implementation: str, numel: int, count: int, dtype=torch.int64, weight=1.0) -> None:
    generator = torch.Generator().manual_seed(6)
    indices = torch.randperm(numel, generator=generator)[:count].to(dtype)
    values, out = torch.randn(count, generator=generator), torch.randn(numel, generator=generator)
    expected = reference("scatter").scatter_add(indices, values, out.clone(), weight)
    device = device_of(implementation)
    target = out.to(device, copy=True)
    result = fast(implementation, "scatter").scatter_add(indices.to(device), values.to(device), target, weight)
    assert result is target
    assert_same_bits(target, expected)
