"""What ZeRO++ and LoCo say in a DeepSpeed config, as a block; and where DeepSpeed's own way is known to fail.

`zeropp_loco_param` was LoCo (Xie et al., 2024, arXiv 2407.04480) for the 4-bit gradients of ZeRO++ (Wang et al., 2023,
arXiv 2306.10209), until DeepSpeed 0.18. It is an error since, so here it can only mean the block that does the same::

    h = g + e,  q = code(h),  e <- err_beta e + (1 - err_beta) (h - q),  e = 0 after every reset_T steps

With r = e / (1 - err_beta) that is `ecq_sgd` with alpha = 1 - err_beta and beta = 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...errors import ConfigError, nearest
from .config import BLOCK

_LOCO, _GRADIENTS = "zeropp_loco_param", "zero_quantized_gradients"
_DEFAULTS: dict[str, float] = {"err_beta": 0.8, "reset_T": 1024}


def translate(config: Any) -> Any:
    """`config`, a mapping with LoCo in it, as one with the block; anything else as it is.

    Raises:
        ConfigError: LoCo beside a block, or a parameter that it does not have.
    """
    zero = config.get("zero_optimization") if isinstance(config, Mapping) else None
    if not isinstance(zero, Mapping) or _LOCO not in zero:
        return config
    if BLOCK in config:
        raise ConfigError(
            f"zero_optimization.{_LOCO} and {BLOCK} both say how gradients travel: remove {_LOCO} and {_GRADIENTS}"
        )
    found = zero[_LOCO] or {}
    for key in found:
        if key not in _DEFAULTS:
            raise ConfigError(f"zero_optimization.{_LOCO}: unknown key {key!r}{nearest(key, _DEFAULTS)}")
    loco = {**_DEFAULTS, **found}
    if not 0 <= loco["err_beta"] < 1:
        raise ConfigError(f"zero_optimization.{_LOCO}: err_beta must be from 0 to below 1, not {loco['err_beta']!r}")
    block = {"scheme": "ecq_sgd", "bits": 4, "alpha": round(1 - loco["err_beta"], 12), "reset_steps": loco["reset_T"]}
    rest = {key: value for key, value in zero.items() if key not in (_LOCO, _GRADIENTS)}
    return {**config, "zero_optimization": rest, BLOCK: block}


def concern(config: Any) -> str:
    """What is to be said of a `DeepSpeedConfig` whose gradients DeepSpeed itself is to quantize; "" for nothing."""
    if not (config.zero_config.zero_quantized_gradients and config.bfloat16_config.enabled):
        return ""
    return (
        f"zero_optimization.{_GRADIENTS} with bf16: DeepSpeed 0.19 reads the bits of bf16 gradients as fp16. Use fp16, "
        f'or replace it by "{BLOCK}": {{"scheme": "ecq_sgd", "bits": 4}}'
    )
