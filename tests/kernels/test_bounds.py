"""Whatever a payload holds, decoders touch their own tensors only; and the check of pointers sees what leaves them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compression_plugins.triton_kernels import dispatch, layout

from . import dense_checks as checks
from .bounds import OutOfBounds

pytestmark = pytest.mark.skipif(not dispatch.interpreting(), reason="pointers are checked in Triton's interpreter")

# name -> (family, decoder, bytes of a payload of n elements, arguments after n)
DECODERS = {
    "sign": ("sign", lambda n: layout.sign_bytes(n, 64), (64,)),
    "sign, long blocks": ("sign", lambda n: layout.sign_bytes(n, 4992), (4992,)),
    "2 bits": ("uniform", lambda n: layout.uniform_bytes(n, 2, 96), (2, 96)),
    "4 bits": ("uniform", lambda n: layout.uniform_bytes(n, 4, 64), (4, 64)),
    "8 bits": ("uniform", lambda n: layout.uniform_bytes(n, 8, 64), (8, 64)),
    "16 bits": ("uniform", lambda n: layout.uniform_bytes(n, 16, 32), (16, 32)),
    "bf16": ("cast", lambda n: layout.cast_bytes(n, "bf16", 64), ("bf16", 64)),
    "fp8": ("cast", lambda n: layout.cast_bytes(n, "fp8", 64), ("fp8", 64)),
}


@pytest.mark.parametrize("name", DECODERS)
@settings(max_examples=12, deadline=None)
@given(numel=st.integers(0, 2100), seed=st.integers(0, 2**32 - 1), ranks=st.integers(1, 3))
def test_decoders_of_any_bytes_stay_in_their_tensors_and_agree(name, numel, seed, ranks):
    family, size, arguments = DECODERS[name]
    generator = np.random.default_rng(seed)
    payloads = torch.from_numpy(generator.integers(0, 256, (ranks, size(numel)), dtype=np.uint8))
    ours, theirs = checks.fast("triton", family), checks.reference(family)
    with np.errstate(all="ignore"):  # random bytes are scales of any size
        decoded = getattr(ours, f"{family}_decode")(payloads[0].clone(), numel, *arguments)
        checks.assert_same_bits(decoded, getattr(theirs, f"{family}_decode")(payloads[0].clone(), numel, *arguments))
        if family == "sign":  # its new scales are sums, whose last bit depends on the order
            assert ours.sign_reduce(payloads, numel, *arguments).numel() == size(numel)
        else:
            name = "uniform_average" if family == "uniform" else "cast_reduce"
            reduced = getattr(ours, name)(payloads, numel, *arguments)
            checks.assert_same_bits(reduced, getattr(theirs, name)(payloads, numel, *arguments))


def test_one_element_beyond_the_end_is_seen():
    from triton.runtime.errors import InterpreterError

    from .small_kernels import copy_kernel

    x, out = torch.arange(8.0), torch.empty(8)
    copy_kernel[(1,)](x, out, 8, COUNT=8)
    assert torch.equal(x, out)
    for source, target in ((x[:7], out), (x, out[:7]), (x[1:], out), (x, out[1:])):
        with pytest.raises(InterpreterError, match=OutOfBounds.__name__):
            copy_kernel[(1,)](source, target, 8, COUNT=8)
    copy_kernel[(1,)](x[:7], out, 7, COUNT=8)  # a masked lane may point anywhere
