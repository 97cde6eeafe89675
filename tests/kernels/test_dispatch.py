"""Dispatch: who runs where, that nothing is replaced silently, and that the table is the whole public interface."""

from __future__ import annotations

import inspect
import subprocess
import sys

import pytest
import torch

from compression_plugins import triton_kernels as K
from compression_plugins.errors import UnsupportedError
from compression_plugins.triton_kernels import dispatch

CPU, CUDA, META = torch.device("cpu"), torch.device("cuda"), torch.device("meta")


def test_device_decides_when_nothing_is_forced(monkeypatch):
    monkeypatch.delenv(dispatch.ENVIRONMENT, raising=False)
    assert dispatch.implementation(CPU) == "cpu"
    assert dispatch.implementation(CUDA) == "triton"
    with pytest.raises(UnsupportedError, match="no kernels for tensors on 'meta'.*reference"):
        dispatch.implementation(META)


@pytest.mark.parametrize("name", ["reference", "cpu", "triton", "Triton "])
def test_environment_forces_an_implementation(monkeypatch, name):
    monkeypatch.setenv(dispatch.ENVIRONMENT, name)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert dispatch.implementation(CPU) == name.strip().lower()


def test_what_is_forced_and_cannot_run_is_refused(monkeypatch):
    monkeypatch.setenv(dispatch.ENVIRONMENT, "cpu")
    with pytest.raises(UnsupportedError, match="cannot read tensors on 'cuda'"):
        dispatch.implementation(CUDA)
    monkeypatch.setenv(dispatch.ENVIRONMENT, "triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(UnsupportedError, match="TRITON_INTERPRET=1"):
        dispatch.implementation(CPU)
    monkeypatch.setenv(dispatch.ENVIRONMENT, "fastest")
    with pytest.raises(UnsupportedError, match="not one of reference, cpu, triton"):
        dispatch.implementation(CPU)


def test_forced_implementation_is_the_one_that_runs(monkeypatch):
    ran, stats = [], K.stats  # made before the modules below are patched
    for name in ("reference", "cpu"):
        module = dispatch.load(name, "stats")
        monkeypatch.setattr(module, "stats", lambda x, name=name: ran.append(name))
    for name in ("reference", "cpu"):
        monkeypatch.setenv(dispatch.ENVIRONMENT, name)
        stats(torch.ones(3))
        stats(x=torch.ones(3))
    assert ran == ["reference", "reference", "cpu", "cpu"]


@pytest.mark.parametrize("name", dispatch.FAMILY_OF)
def test_every_function_has_three_implementations_with_one_signature(name):
    """Parameter names, order and defaults are equal, so that a call valid in one is valid in all."""

    def parameters(implementation):
        function = getattr(dispatch.load(implementation, dispatch.FAMILY_OF[name]), name)
        return [(p.name, p.kind, p.default) for p in inspect.signature(function).parameters.values()]

    assert parameters("cpu") == parameters("reference") == parameters("triton")
    assert getattr(K, name).__doc__, "a public function is documented"


def test_the_table_is_the_public_interface():
    assert set(K.__all__) == {*dispatch.FAMILY_OF, "Key", "layout", "uniform16"}
    with pytest.raises(AttributeError, match="no attribute 'sign_encoded'"):
        K.sign_encoded  # noqa: B018


def test_missing_dependency_is_named_with_its_remedy():
    script = (
        "import sys; sys.modules['numba'] = None\n"
        "import torch; from compression_plugins import triton_kernels as K\n"
        "K.stats(torch.ones(3))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert "UnsupportedError" in done.stderr and "pip install numba" in done.stderr


def test_importing_the_package_imports_neither_numba_nor_triton():
    script = (
        "import sys, torch; torch_brings = set(sys.modules)\n"
        "from compression_plugins import triton_kernels as K; K.sign_encode\n"
        "print([m for m in ('numba', 'triton') if m in sys.modules and m not in torch_brings])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "[]", done.stderr
