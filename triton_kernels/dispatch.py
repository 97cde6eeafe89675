"""Which implementation of a kernel runs: Triton for CUDA tensors, Numba for CPU tensors, PyTorch when asked for.

``COMPRESSION_PLUGINS_KERNELS=reference|cpu|triton`` forces one for every call of the process; an implementation that
cannot run here is refused with the reason and never replaced by another one.
"""

from __future__ import annotations

import functools
import importlib
import os
from collections.abc import Callable
from types import ModuleType

import torch

from ..errors import UnsupportedError

ENVIRONMENT = "COMPRESSION_PLUGINS_KERNELS"

# family (a module in each of reference/, cpu/ and gpu/) -> its public functions
TABLE: dict[str, tuple[str, ...]] = {
    "stats": ("stats",),
    "sign": ("sign_encode", "sign_decode", "sign_reduce", "sign_vote", "sign_apply", "sign_draw"),
    "uniform": (
        "uniform_encode",
        "uniform_decode",
        "uniform_reduce",
        "uniform_average",
        "uniform_apply",
        "uniform_round",
    ),
    "pack": ("pack_bits", "unpack_bits"),
    "cast": ("cast_encode", "cast_decode", "cast_reduce"),
    "chunk": ("chunk_select", "chunk_gather"),
    "fold": ("bit_merge", "one_hot_signs", "signs_expand", "sign_bits"),
    "scatter": ("scatter_add",),
}
FAMILY_OF = {name: family for family, names in TABLE.items() for name in names}

_FOLDER = {"reference": "reference", "cpu": "cpu", "triton": "gpu"}
_NEEDS = {"cpu": "numba", "triton": "triton"}


def interpreting() -> bool:
    """Whether Triton kernels run in Triton's interpreter, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")


def implementation(device: torch.device) -> str:
    """Name of the implementation for tensors on ``device``: ``reference``, ``cpu`` or ``triton``.

    Raises:
        UnsupportedError: no implementation exists for the device, or the forced one cannot run on it.
    """
    forced = os.environ.get(ENVIRONMENT, "").strip().lower()
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
    if forced == "triton" and device.type == "cpu" and not interpreting():
        raise UnsupportedError(
            f"{ENVIRONMENT}=triton with CPU tensors needs Triton's interpreter: "
            "set TRITON_INTERPRET=1 before Python starts, or use CUDA tensors"
        )
    return forced


@functools.cache
def load(name: str, family: str) -> ModuleType:
    """The module of ``family`` in implementation ``name``; imports Numba or Triton at the first use only."""
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


def _device_of(args: tuple, kwargs: dict) -> torch.device:
    for value in (*args, *kwargs.values()):
        if isinstance(value, torch.Tensor):
            return value.device
    raise TypeError("a kernel takes at least one torch.Tensor")


def dispatched(name: str) -> Callable:
    """The public function ``name``: documented by its reference, run by the implementation of the device."""
    family = FAMILY_OF[name]

    @functools.wraps(getattr(load("reference", family), name))
    def call(*args, **kwargs):
        return getattr(load(implementation(_device_of(args, kwargs)), family), name)(*args, **kwargs)

    return call
