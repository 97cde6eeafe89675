"""Numba kernels for CPU tensors: one pass over memory in blocks that stay in the first-level cache."""
