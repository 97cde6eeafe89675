"""Compiles the Triton kernels for the CUDA capability given as argument and prints their PTX; needs no GPU."""

from __future__ import annotations

import sys

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from compression_plugins import triton_kernels as K
from compression_plugins.triton_kernels import dispatch


class Target:
    """The part of a Triton driver that compilation asks."""

    def get_current_target(self):
        return GPUTarget("cuda", int(sys.argv[1]), 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


def compile_only(self, *args, grid, warmup, launch=JITFunction.run, **kwargs):
    compiled = launch(self, *args, grid=grid, warmup=True, **kwargs)
    print(f"// kernel {self.__name__}\n{compiled.asm['ptx']}")


driver.set_active(Target())
JITFunction.run = compile_only
dispatch.implementation = lambda device: "triton"  # of tensors on the CPU, which nothing will read
x, r, updated, key = torch.empty(5003), torch.empty(5003), torch.empty(5003), K.Key(1, 2, 3, 4)
with dispatch.running("triton"):
    for memory in ({"residual": r}, {"residual": r, "updated": updated}):
        payload = K.sign_encode(x, 512, **memory)
        K.uniform_encode(x.bfloat16()[::1], 8, 512, key, "l2", **memory)
        K.cast_encode(x, "fp8", 512, **memory)
        K.cast_encode(x, "bf16", 512, **memory)
        indices, values = K.chunk_select(x, 112, **memory)
        K.chunk_gather(x.half(), indices, 112, **memory)
        K.chunk_gather(x, torch.zeros(1, dtype=torch.int32), 5003, **memory)
        bits = K.one_hot_signs(x, 1, 3, key, **memory)
        K.signs_expand(bits, 5003, 0.1, **memory)
    K.sign_decode(payload, 5003, 512, out=r, accumulate=True)
    K.sign_reduce(torch.stack([payload] * 3), 5003, 512)
    K.sign_draw(x, key)
    payload = K.uniform_encode(x, 8, 512, key)
    K.uniform_reduce(torch.stack([payload] * 3), 5003, 8, 512, key)
    K.uniform_average(torch.stack([payload] * 3), 5003, 8, 512)
    K.uniform_round(x, 8, 1.0, key)
    for kind in ("bf16", "fp8"):
        payload = K.cast_encode(x, kind, 512)
        K.cast_reduce(torch.stack([payload] * 3), 5003, kind, 512)
        K.cast_decode(payload, 5003, kind, 512)
    K.bit_merge(bits, bits, 2, 1, key)
    K.scatter_add(indices, values, r, 0.5)
