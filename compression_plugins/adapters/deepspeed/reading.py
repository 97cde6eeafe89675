"""How a DeepSpeed config is read: YAML too, with the block, and what DeepSpeed has dropped."""

from __future__ import annotations

import difflib
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...config import read_document
from ...engine.notice import warn
from ...errors import ConfigError
from . import one_bit, zeropp
from .config import BLOCK, parse, refuse_config

#: Similarity (0 to 1) from which another key is the block misspelt; DeepSpeed's own keys reach 0.7.
_CLOSE = 0.76
_SYNONYMS = ("gradient_compression", "compression_plugins")


def wrap_loader(module: Any) -> None:
    """Let `module.load_ds_config` read YAML, too."""
    original = module.load_ds_config

    @functools.wraps(original)
    def load_ds_config(config: Any) -> dict[str, Any]:
        return original(from_yaml(config))

    module.load_ds_config = load_ds_config


def wrap_config(cls: Any) -> None:
    """Let `DeepSpeedConfig` read the block; the result is its attribute `communication_compression`, or None."""
    original = cls.__init__

    @functools.wraps(original)
    def __init__(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        original(self, zeropp.translate(from_yaml(config)), *args, **kwargs)
        refuse_near_misses(self._param_dict)
        given = BLOCK in self._param_dict
        block = parse(self._param_dict[BLOCK]) if given else None
        self.communication_compression = one_bit.read(self, block, given)
        self.communication_compression_widened = False
        if self.communication_compression is None:
            if zeropp.concern(self) and not self.global_rank:
                warn(zeropp.concern(self))
            return
        refuse_config(self)
        if self.communication_data_type is None and self.grad_accum_dtype == "fp32" and self.world_size > 1:
            # DeepSpeed would round accumulated fp32 gradients to the model's dtype for the wire. Compressed, they cost
            # the same there in either dtype, and error feedback cannot see a rounding that happens before it.
            import torch

            self.communication_data_type = torch.float32
            self.communication_compression_widened = True

    cls.__init__ = __init__


def refuse_near_misses(document: Mapping[str, Any]) -> None:
    """Raise `ConfigError` for a key that was meant to be the block: DeepSpeed ignores top-level keys unknown to it."""
    for key in document:
        word = str(key).strip().lower().replace("-", "_").replace(" ", "_")
        close = difflib.SequenceMatcher(None, word, BLOCK).ratio() >= _CLOSE
        if key != BLOCK and (close or set(word.split("_")) == set(BLOCK.split("_")) or word in _SYNONYMS):
            raise ConfigError(f"DeepSpeed config: unknown key {key!r}, which would be ignored; did you mean {BLOCK!r}?")


def from_yaml(config: Any) -> Any:
    """The mapping in it where `config` is the path of a YAML file; else `config` itself."""
    path = isinstance(config, (str, Path)) and str(config).lower().endswith((".yaml", ".yml"))
    return read_document(config) if path else config
