"""Rank 1 runs without the plugin, as on a node where it is not installed."""

from __future__ import annotations

import os
import sys

if os.environ["RANK"] == "1":
    os.environ["TORCH_DEVICE_BACKEND_AUTOLOAD"] = "0"  # the entry point
    sys.meta_path[:] = [f for f in sys.meta_path if type(f).__name__ != "HostFinder"]  # what the .pth file has added

import train

train.main()
