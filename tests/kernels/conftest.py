"""Kernels that run in Triton's interpreter do so with every pointer checked against its tensor."""

from __future__ import annotations

import importlib.util

import pytest

from compression_plugins.triton_kernels import dispatch

from .bounds import checked


@pytest.fixture(autouse=True, scope="module")
def pointers_stay_in_their_tensors():
    if dispatch.interpreting() and importlib.util.find_spec("triton"):
        with checked():
            yield
    else:
        yield
