"""Philox4x32-10: the known answers of Random123 in all implementations, and the rule that maps elements to bits."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from compression_plugins.triton_kernels import Key, philox

from . import dense_checks as checks

FULL = 0xFFFFFFFF
KNOWN = [  # counter, key, output: Random123's kat_vectors
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((FULL,) * 4, (FULL,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


def key_of(counter, words) -> Key:
    """The key whose first counter is ``counter``."""
    return Key(words[0], words[1], counter[1], counter[2], counter[3], 8 * counter[0])


def halves_on_cpu(key: Key, numel: int) -> torch.Tensor:
    from compression_plugins.triton_kernels.cpu import _philox

    counters = -(-numel // 8)
    out = np.empty(4 * (counters + 8), np.uint32)
    _philox.fill(out, counters, 0, _philox.words_of(key))
    return torch.from_numpy(out.view(np.uint16)[:numel].astype(np.int32))


def halves_in_triton(key: Key, numel: int) -> torch.Tensor:
    import triton

    from compression_plugins.triton_kernels.gpu import _philox

    from .small_kernels import uniform16_kernel

    counters = triton.next_power_of_2(-(-numel // 8))
    out = torch.empty(8 * counters, dtype=torch.int32, device=checks.device_of("triton"))
    uniform16_kernel[(1,)](out, *_philox.words_of(key), COUNTERS=counters)
    return out.cpu()[:numel]


IMPLEMENTATIONS = {"reference": philox.uniform16, "cpu": halves_on_cpu, "triton": halves_in_triton}


@pytest.mark.parametrize("counter, key, output", KNOWN)
def test_known_answers_of_random123(counter, key, output):
    assert tuple(philox.philox4x32(torch.tensor(counter)[:, None], key)[:, 0].tolist()) == output


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("counter, key, output", KNOWN)
def test_one_counter_serves_eight_elements_low_half_first(implementation, counter, key, output):
    halves = IMPLEMENTATIONS[implementation](key_of(counter, key), 8)
    assert halves.tolist() == [word >> shift & 0xFFFF for word in output for shift in (0, 16)]


@pytest.mark.parametrize("implementation", ["cpu", "triton"])
@pytest.mark.parametrize("numel", [1, 8, 31, 1000])
def test_implementations_agree_and_the_counter_wraps(implementation, numel):
    for key in (checks.KEY, Key(FULL, FULL, FULL, FULL, FULL, 8 * (FULL - 2)), Key(0, 1 << 31, 5, 1, 2, 1 << 30)):
        assert torch.equal(IMPLEMENTATIONS[implementation](key, numel), philox.uniform16(key, numel))


def test_offset_continues_the_stream():
    whole = philox.uniform16(Key(1, 2, 3, 4), 4096)
    assert torch.equal(philox.uniform16(Key(1, 2, 3, 4, offset=1000), 3096), whole[1000:])


def test_each_field_of_the_key_names_another_stream():
    base = Key(1, 2, 3, 4, 5, 8)
    streams = [base] + [base._replace(**{field: 99}) for field in ("seed", "tensor", "step", "rank", "stream")]
    draws = torch.stack([philox.uniform16(key, 4096).float() for key in streams])
    correlation = torch.corrcoef(draws) - torch.eye(len(streams))
    assert correlation.abs().max() < 5 / 4096**0.5


def test_variates_are_uniform_and_never_zero_or_one():
    u = philox.uniform(Key(0, 0, 0, 0), 1 << 18).double()
    assert 0 < u.min() and u.max() < 1
    assert abs(u.mean() - 0.5) < 5 * (1 / 12) ** 0.5 / 2**9
    counts = torch.histc(u, 256, 0, 1)
    assert 150 < ((counts - 1024).square() / 1024).sum() < 380  # chi-square, 255 degrees of freedom, +- 5 sigma
