"""Which implementation of a kernel runs: Triton for CUDA tensors, Numba for CPU tensors, PyTorch when asked for.

``COMPRESSION_PLUGINS_KERNELS=reference|cpu|triton`` forces one for every call of the process; an implementation that
cannot run here is refused with the reason and never replaced by another one.

A kernel is registered by its name alone: a public function of a module in ``ops/``, and a body with the same name in
the module of the same name in each of ``reference/``, ``cpu/`` and ``gpu/``.
"""

from __future__ import annotations

import functools
import importlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from types import ModuleType
from typing import Any

import torch

from ..errors import UnsupportedError

ENVIRONMENT = "COMPRESSION_PLUGINS_KERNELS"

_FOLDER = {"reference": "reference", "cpu": "cpu", "triton": "gpu"}
_NEEDS = {"cpu": "numba", "triton": "triton"}
_running: ContextVar[str | None] = ContextVar("implementation", default=None)
_computing: ContextVar[bool] = ContextVar("computing", default=True)


def interpreting() -> bool:
    """Whether Triton kernels run in Triton's interpreter, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")


@contextmanager
def running(name: str, computing: bool = True) -> Iterator[None]:
    """Inside, every kernel call of this thread runs implementation ``name``, whatever the environment says.

    ``computing=False``: Triton's driver compiles and launches nothing, so that tensors may lie anywhere.
    """
    token, other = _running.set(name), _computing.set(computing)
    try:
        yield
    finally:
        _running.reset(token)
        _computing.reset(other)


def implementation(device: torch.device) -> str:
    """Name of the implementation for tensors on ``device``: ``reference``, ``cpu`` or ``triton``.

    Raises:
        UnsupportedError: no implementation exists for the device, or the forced one cannot run on it.
    """
    forced = (_running.get() or os.environ.get(ENVIRONMENT, "")).strip().lower()
    if not forced:
        if device.type not in ("cuda", "cpu"):
            raise UnsupportedError(
                f"no kernels for tensors on {device.type!r}: move them to CPU or CUDA, "
                f"or set {ENVIRONMENT}=reference to run the (slow) PyTorch reference"
            )
        return "triton" if device.type == "cuda" else "cpu"
    if forced not in _FOLDER:
        raise UnsupportedError(f"{ENVIRONMENT}={forced!r} is not one of {', '.join(_FOLDER)}")
    if forced == "cpu" and device.type != "cpu":
        raise UnsupportedError(f"{ENVIRONMENT}=cpu cannot read tensors on {device.type!r}: unset it")
    if forced == "triton" and device.type == "cpu" and _computing.get() and not interpreting():
        raise UnsupportedError(
            f"{ENVIRONMENT}=triton with CPU tensors needs Triton's interpreter: "
            "set TRITON_INTERPRET=1 before Python starts, or use CUDA tensors"
        )
    return forced


@functools.cache
def load(name: str, family: str) -> ModuleType:
    """The bodies of ``family`` in implementation ``name``; imports Numba or Triton at the first use only."""
    try:
        return importlib.import_module(f".{_FOLDER[name]}.{family}", __package__)
    except ModuleNotFoundError as error:
        needed = _NEEDS.get(name)
        if needed is None or error.name is None or error.name.partition(".")[0] != needed:
            raise
        raise UnsupportedError(
            f"the {name} kernels need {needed}, which is not installed: `pip install {needed}`, "
            f"or set {ENVIRONMENT}=reference to run the (slow) PyTorch reference"
        ) from error


class Bodies:
    """The bodies of the family whose front is ``module``: called with a tensor, those that run where it lies."""

    def __init__(self, module: str):
        self.family = module.rpartition(".")[2]

    def __call__(self, like: torch.Tensor) -> Any:
        if like.is_cpu and not (_running.get() or os.environ.get(ENVIRONMENT)):
            return load("cpu", self.family)
        return load(implementation(like.device), self.family)
