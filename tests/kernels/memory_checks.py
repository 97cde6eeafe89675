"""Memory that goes elsewhere: tests/kernels runs these laws on the CPU, tests/gpu on CUDA."""

from __future__ import annotations

import torch

from .sparse_checks import KEY, assert_same_bits, device_of, fast, random_bits, vector

FACTORS = ((1.0, 1.0, 1.0), (0.3, 0.9, 0.7))  # (alpha, decay, sent)

# name -> (family, function, arguments after the vector); a block or a chunk is short, or longer than a tile
CALLS: dict[str, tuple[str, str, tuple]] = {
    "sign": ("sign", "sign_encode", (64,)),
    "sign, long blocks": ("sign", "sign_encode", (4992,)),
    "uniform": ("uniform", "uniform_encode", (4, 64, KEY)),
    "uniform, 8 bits, nearest": ("uniform", "uniform_encode", (8, 96, None, "l2", "nearest")),
    "uniform, 16 bits, long blocks": ("uniform", "uniform_encode", (16, 4992, KEY)),
    "bf16": ("cast", "cast_encode", ("bf16", 64)),
    "fp16": ("cast", "cast_encode", ("fp16", 64)),
    "fp8": ("cast", "cast_encode", ("fp8", 64)),
    "fp8, long blocks": ("cast", "cast_encode", ("fp8", 4992)),
    "select": ("chunk", "chunk_select", (100,)),
    "select, long chunks": ("chunk", "chunk_select", (4500,)),
    "gather": ("chunk", "chunk_gather", (100,)),
    "gather, long chunks": ("chunk", "chunk_gather", (4500,)),
    "bits": ("fold", "sign_bits", ()),
    "one hot": ("fold", "one_hot_signs", (1, 3, KEY)),
    "expand": ("fold", "signs_expand", (0.1,)),
    "expand each": ("fold", "signs_expand_each", ()),
}


def run(implementation: str, call: str, x: torch.Tensor, factors: tuple, **memory: torch.Tensor) -> list[torch.Tensor]:
    """The results of one call, on the CPU."""
    family, function, arguments = CALLS[call]
    device, numel = device_of(implementation), x.numel()
    given: tuple = (x.to(device),)
    if function == "chunk_gather":
        generator = torch.Generator().manual_seed(2)
        indices = torch.randint(0, arguments[0], (-(-numel // arguments[0]),), generator=generator, dtype=torch.int32)
        given += (indices.to(device),)
    if function == "signs_expand":
        given = random_bits(numel, 3).to(device), numel
    if function == "signs_expand_each":
        sizes = [numel // 3, numel - numel // 3]
        given = random_bits(numel, 3).to(device), torch.tensor([0.1, 2.0], device=device), sizes
    named: dict = dict(memory)
    if family != "fold":
        named |= dict(zip(("alpha", "decay", "sent"), factors, strict=True))
    result = getattr(fast(implementation, family), function)(*given, *arguments, **named)
    return [part.cpu() for part in (result if isinstance(result, tuple) else (result,))]


def spoiled(numel: int) -> torch.Tensor:
    """A vector with a NaN, an Inf and a number that overflows fp16; the last block and some others are finite."""
    x = vector(numel)
    for place, value in ((0.05, float("nan")), (0.4, -float("inf")), (0.7, 1e6)):
        if numel > 300:
            x[int(place * numel)] = value
    return x


def check_updated(implementation: str, call: str, numel: int, factors: tuple) -> None:
    """The memory in ``updated`` is, bit for bit, the one in place; ``residual`` and the message are what they were."""
    x, old = spoiled(numel), vector(numel, seed=1)
    device = device_of(implementation)
    place, kept = old.to(device, copy=True), old.to(device, copy=True)
    updated = torch.full((numel,), 7e7, device=device)
    message = run(implementation, call, x, factors, residual=place)
    other = run(implementation, call, x, factors, residual=kept, updated=updated)
    for ours, wanted in zip(other, message, strict=True):
        assert_same_bits(ours, wanted)
    assert_same_bits(kept, old)
    assert_same_bits(updated, place.cpu())
    assert not (updated == 7e7).any(), "an element is not written"
    both = old.to(device, copy=True)
    run(implementation, call, x, factors, residual=both, updated=both[:])  # one memory under two names is in place
    assert_same_bits(both, place.cpu())
