"""One job, many cases: `faults.py MODULE ...` runs the cases of those modules and prints a `RESULT {json}` a rank."""

from __future__ import annotations

import importlib
import sys

import faults_base

for module in sys.argv[1:]:
    importlib.import_module(module)
faults_base.report()
