"""Rank 1 runs without the plugin: torch loads none there."""

from __future__ import annotations

import os

if os.environ["RANK"] == "1":
    os.environ["TORCH_DEVICE_BACKEND_AUTOLOAD"] = "0"

import train

train.main()
