"""Bench of this package on this machine: kernels and schemes, `python -m compression_plugins.bench`."""
