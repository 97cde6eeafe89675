"""How the kernels are compiled."""

from __future__ import annotations

import functools

from numba import njit

# nogil: threads of Horovod and Gloo run beside. The numpy error model gives IEEE division, which also vectorises.
# No fast-math: an FMA or another order would change the bits that the three implementations agree on.
jit = functools.partial(njit, nogil=True, cache=True, error_model="numpy")
