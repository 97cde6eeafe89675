"""The fronts of the kernels, one module per family: contract, checks and outputs of each public function, once.

A public function here calls the body of the same name in the implementation that its tensors ask for. Writing the
function and its three bodies is all there is to a new kernel: the tables below are read off the modules.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Callable
from typing import Any

FUNCTIONS: dict[str, Callable[..., Any]] = {}
FAMILY_OF: dict[str, str] = {}  # name of a public function -> its family

for _family in sorted(module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_")):
    _module = importlib.import_module(f".{_family}", __name__)
    for _name, _function in inspect.getmembers(_module, inspect.isfunction):
        if _function.__module__ == _module.__name__ and not _name.startswith("_"):
            FUNCTIONS[_name], FAMILY_OF[_name] = _function, _family
