"""Accelerate, and so Hugging Face's Trainer, between a script and DeepSpeed: they read its config before it does.

Two of their habits are in the way of the block: they read JSON only, and take every "auto" in a config for a word of
their own. Nothing is imported here before a config is read, for these modules are in many jobs that never compress.
"""

from __future__ import annotations

import functools
import sys
from typing import Any

#: Module -> the class in it that is wrapped.
_CLASSES = {"accelerate.utils.deepspeed": "HfDeepSpeedConfig", "accelerate.utils.dataclasses": "DeepSpeedPlugin"}


def install() -> None:
    """Wrap what is imported of Accelerate. Idempotent."""
    for (module, name), wrap in zip(_CLASSES.items(), (_wrap_reading, _wrap_filling)):
        cls = getattr(sys.modules.get(module), name, None)
        if cls is not None and not getattr(cls, "_reads_compression", False):
            wrap(cls)
            cls._reads_compression = True


def _wrap_reading(cls: Any) -> None:
    """`HfDeepSpeedConfig`: a path may be that of a YAML file."""
    original = cls.__init__

    @functools.wraps(original)
    def __init__(self: Any, config_file_or_dict: Any, *args: Any, **kwargs: Any) -> None:
        from .reading import from_yaml

        original(self, from_yaml(config_file_or_dict), *args, **kwargs)

    cls.__init__ = __init__


def _wrap_filling(cls: Any) -> None:
    """`DeepSpeedPlugin`: "auto" inside of the block is the block's."""
    original = getattr(cls, "fill_match", None)
    if original is None:
        return

    @functools.wraps(original)
    def fill_match(self: Any, ds_key_long: str, *args: Any, **kwargs: Any) -> None:
        from .config import BLOCK

        if not ds_key_long.startswith(f"{BLOCK}."):
            original(self, ds_key_long, *args, **kwargs)

    cls.fill_match = fill_match
