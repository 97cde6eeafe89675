"""What the interpreter cannot show: the kernels compile for real GPUs, and without fused multiply-add."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest


@pytest.mark.nightly
@pytest.mark.parametrize("capability", [80, 90])
def test_kernels_compile_and_keep_every_rounding(capability):
    """An FMA skips a rounding that the CPU makes: codes and residuals would differ in the last bit."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.kernels.compile_for", str(capability)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("// kernel") == 34
    assert f".target sm_{capability}" in done.stdout
    assert "fma.rn.f32" not in done.stdout and "div.full.f32" not in done.stdout
