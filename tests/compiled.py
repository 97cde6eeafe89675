"""`python -m tests.compiled`: compile the CPU kernels once, so that not every process of the tests has to."""

from __future__ import annotations

import torch

from compression_plugins import triton_kernels as K
from compression_plugins.bench.kernels import cases

if __name__ == "__main__":
    for case in cases(2000, torch.device("cpu")):
        getattr(K, case.kernel)(*case.args, **case.kwargs)
