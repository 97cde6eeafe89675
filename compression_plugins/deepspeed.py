"""Importing this installs the DeepSpeed adapter, where torch's plug-in mechanism is switched off."""

from .adapters.deepspeed.engine import install

__all__ = ["install"]
