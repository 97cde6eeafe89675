"""Prints, as JSON, what the kernels of the hot path compile to for the target given as argument; needs no GPU."""

from __future__ import annotations

import json
import sys

import torch

from compression_plugins.bench import static
from compression_plugins.triton_kernels import chunk_select

HOT = {"sign_encode", "sign_decode", "uniform_encode", "uniform_decode", "uniform_average"}
NUMEL = 2**20


def chunks_of(chunk: int, capability: int) -> dict:
    """Loads and stores of a selection with memory, by their width in bits, for a chunk that is no power of two."""
    with static.compiling(capability) as compiled:
        x, r = torch.empty(NUMEL), torch.empty(NUMEL)
        (code,) = compiled(lambda: chunk_select(x, chunk, r))
    return {"loads": code.loads, "stores": code.stores, "spills": code.spills, "registers": code.registers}


if __name__ == "__main__":
    target = static.target_of(sys.argv[1])
    print(json.dumps({"rows": static.measure(target, [NUMEL], HOT), "chunk 100": chunks_of(100, target)}))
