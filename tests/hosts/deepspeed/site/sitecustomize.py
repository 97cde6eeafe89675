"""For the jobs of these tests: DeepSpeed must not build its shared-memory op at start-up.

It takes g++ half a minute on a CPU-only machine, and only inference uses it. DeepSpeed has no switch for it, so the
table of ops that can be built is emptied as soon as its module exists.
"""

from __future__ import annotations

import importlib.util
import sys
from importlib.machinery import PathFinder

_HOLDER = "deepspeed.ops"


class _Finder:
    def find_spec(self, name, path=None, target=None):
        if name != _HOLDER:
            return None
        spec = PathFinder.find_spec(name, path, target)
        run = spec.loader.exec_module

        def exec_module(module):
            run(module)
            module.__compatible_ops__ = {}

        spec.loader.exec_module = exec_module
        return spec


if importlib.util.find_spec("deepspeed") is not None:
    sys.meta_path.insert(0, _Finder())
