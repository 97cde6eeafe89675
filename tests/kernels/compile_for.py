"""Compiles the Triton kernels for the CUDA capability given as argument and prints their PTX; needs no GPU."""

from __future__ import annotations

import sys

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from compression_plugins.triton_kernels import Key
from compression_plugins.triton_kernels.gpu import cast, chunk, fold, scatter, sign, uniform


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
x, r = torch.empty(5003), torch.empty(5003)
payload = sign.sign_encode(x, 512, r)
sign.sign_decode(payload, 5003, 512, out=r, accumulate=True)
sign.sign_draw(x, Key(1, 2, 3, 4))
payload = uniform.uniform_encode(x.bfloat16()[::1], 8, 512, Key(1, 2, 3, 4), "l2", residual=r)
uniform.uniform_reduce(torch.stack([payload] * 3), 5003, 8, 512, Key(1, 2, 3, 4), residual=r)
uniform.uniform_average(torch.stack([payload] * 3), 5003, 8, 512)
uniform.uniform_apply(payload, x, 8, 512, 0.1, r, 0.9)
uniform.uniform_round(x, 8, 1.0, Key(1, 2, 3, 4))
cast.cast_encode(x, "fp8", 512, r)
indices, values = chunk.chunk_select(x, 112, r)
chunk.chunk_gather(x.half(), indices, 112, r)
chunk.chunk_gather(x, torch.zeros(1, dtype=torch.int32), 5003, r)
bits = fold.one_hot_signs(x, 1, 3, Key(1, 2, 3, 4), r)
fold.bit_merge(bits, bits, 2, 1, Key(1, 2, 3, 4))
fold.signs_expand(bits, 5003, 0.1, r)
scatter.scatter_add(indices, values, r, 0.5)
