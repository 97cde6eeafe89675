"""Dispatch: who runs where, that nothing is replaced silently, and that a kernel is registered by its name alone."""

from __future__ import annotations

import ast
import inspect
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from compression_plugins import triton_kernels as K
from compression_plugins.errors import UnsupportedError
from compression_plugins.triton_kernels import dispatch, ops

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
    ran = []
    for name in ("reference", "cpu"):
        module = dispatch.load(name, "stats")
        monkeypatch.setattr(module, "stats", lambda x, memory, out, name=name: ran.append(name))
    for name in ("reference", "cpu"):
        monkeypatch.setenv(dispatch.ENVIRONMENT, name)
        K.stats(torch.ones(3))
        K.stats(x=torch.ones(3))
    with dispatch.running("reference"):
        K.stats(torch.ones(3))
    assert ran == ["reference", "reference", "cpu", "cpu", "reference"]


@pytest.mark.parametrize("name", ops.FAMILY_OF)
def test_every_front_has_three_bodies_with_one_signature(name):
    """Names and order of the parameters are equal; no body has a default, since the front gives every argument."""

    def parameters(implementation):
        function = getattr(dispatch.load(implementation, ops.FAMILY_OF[name]), name)
        return [(p.name, p.kind, p.default) for p in inspect.signature(function).parameters.values()]

    assert parameters("cpu") == parameters("reference") == parameters("triton")
    assert all(default is inspect.Parameter.empty for _, _, default in parameters("cpu"))
    for word in ("Returns:", "Raises:", *(p for p in inspect.signature(getattr(K, name)).parameters)):
        assert word in getattr(K, name).__doc__, f"{name} does not document {word}"


def test_names_are_those_of_the_fronts_for_python_and_for_type_checkers():
    assert set(K.__all__) == set(dir(K)) == {*ops.FAMILY_OF, "Key", "layout", "uniform16"}
    with pytest.raises(AttributeError, match="no attribute 'sign_encoded'"):
        K.sign_encoded  # noqa: B018
    stars = {
        node.module
        for node in ast.walk(ast.parse(Path(K.__file__).read_text()))
        if isinstance(node, ast.ImportFrom) and node.names[0].name == "*"
    }
    assert stars == {f"ops.{family}" for family in ops.FAMILY_OF.values()}


def test_a_new_kernel_is_a_front_and_three_bodies(tmp_path):
    """Written into a copy of the package; nothing else is touched."""
    import shutil

    package = Path(K.__file__).resolve().parent
    copy = tmp_path / "outer" / "kernels"
    shutil.copytree(package, copy, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("errors.py", "_version.py"):  # all that kernels take from the package
        shutil.copy(Path(K.__file__).parents[1] / name, tmp_path / "outer" / name)
    (tmp_path / "outer" / "__init__.py").write_text("")
    front = (
        "\n\ndef negate(x: Tensor) -> Tensor:\n    out = torch.empty_like(x)\n"
        "    _bodies(x).negate(x, out)\n    return out\n"
    )
    bodies = "\n\ndef negate(x, out):\n    torch.neg(x, out=out)\n"
    for folder, text in (("ops", front), ("reference", bodies), ("cpu", "\nimport torch\n" + bodies), ("gpu", bodies)):
        with (copy / folder / "stats.py").open("a") as file:
            file.write(text)
    script = "import torch; from outer import kernels as K; print(K.negate(torch.ones(2)).tolist())"
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "[-1.0, -1.0]", done.stderr


def test_missing_dependency_is_named_with_its_remedy():
    script = (
        "import sys; sys.modules['numba'] = None\n"
        "import torch; from compression_plugins import triton_kernels as K\n"
        "K.stats(torch.ones(3))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert "UnsupportedError" in done.stderr and "pip install numba" in done.stderr


def test_importing_the_package_imports_nothing_and_a_name_only_torch():
    script = (
        "import sys\n"
        "from compression_plugins import triton_kernels as K\n"
        "print([m for m in ('torch', 'numba', 'triton') if m in sys.modules])\n"
        "import torch; torch_brings = set(sys.modules)\n"
        "K.sign_encode\n"
        "print([m for m in ('numba', 'triton') if m in sys.modules and m not in torch_brings])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.stdout.split("\n")[:2] == ["[]", "[]"], done.stdout + done.stderr
