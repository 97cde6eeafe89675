"""Triton kernels for CUDA tensors: one fused, bandwidth-bound pass each."""
