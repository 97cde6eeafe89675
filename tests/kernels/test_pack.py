"""Bit packing: the payload is one little-endian integer, for every width and length."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compression_plugins import triton_kernels as K
from compression_plugins.errors import CompressionError

from . import dense_checks as checks

ALL = ("reference", *checks.FAST)


@pytest.mark.parametrize("implementation", ALL)
@pytest.mark.parametrize("width", range(1, 17))
@pytest.mark.parametrize("numel", [0, 1, 7, 32, 33, 2003])
def test_packed_codes_are_one_little_endian_integer(implementation, width, numel):
    checks.check_pack(implementation, numel, width)


@settings(max_examples=300, deadline=None)
@given(data=st.data(), width=st.integers(1, 16))
def test_unpack_inverts_pack(data, width):
    codes = torch.tensor(data.draw(st.lists(st.integers(0, 2**width - 1), max_size=200)), dtype=torch.int32)
    assert torch.equal(K.unpack_bits(K.pack_bits(codes, width), codes.numel(), width), codes)


@pytest.mark.parametrize("implementation", ALL)
def test_bits_above_the_width_are_dropped_and_strides_read(implementation):
    module = checks.fast(implementation, "pack")
    codes = torch.tensor([0x15, 99, 0x1F, 99, 0x20, 99], dtype=torch.int32).to(checks.device_of(implementation))
    assert module.pack_bits(codes[::2], 4).tolist() == [0xF5, 0x00, 0, 0]


@pytest.mark.parametrize("implementation", ALL)
def test_bad_input_is_one_clear_error(implementation):
    module = checks.fast(implementation, "pack")
    codes = torch.zeros(4, dtype=torch.int32, device=checks.device_of(implementation))
    for width in (0, 17):
        with pytest.raises(CompressionError, match="width must be 1 to 16"):
            module.pack_bits(codes, width)
    with pytest.raises(CompressionError, match="codes must be 1-D int32"):
        module.pack_bits(codes.long(), 4)
    with pytest.raises(CompressionError, match="8 bytes"):
        module.unpack_bits(codes.view(torch.uint8), 10, 5)
