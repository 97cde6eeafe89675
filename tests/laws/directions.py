"""What the tests of directions share: settings that show every phase within some ten steps; looks into the state."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from compression_plugins.engine.reducer import Reducer
from compression_plugins.optimizer.directions import KINDS

from ..world import World, config

LOCAL = ["momentum", "adam"]
WARM = 3
#: Every direction with moments, in a setting that shows all its phases within some ten steps.
SETTINGS: dict[str, dict[str, Any]] = {
    "momentum": {"direction": "momentum"},
    "adam": {"direction": "adam"},
    "frozen_adam": {"direction": {"kind": "frozen_adam", "betas": [0.8, 0.9]}, "warmup_steps": WARM},
    "frozen_lamb": {"direction": {"kind": "frozen_lamb", "betas": [0.8, 0.9]}, "warmup_steps": WARM},
    "zero_one_adam": {"direction": {"kind": "zero_one_adam", "betas": [0.8, 0.9], "refresh": 4}, "warmup_steps": 1},
}
ADAMS = ["frozen_adam", "zero_one_adam"]
SHARED = [*ADAMS, "frozen_lamb"]
#: Of signs, of kept values, of quantized values: what meets every branch of the engine.
SOME = ["none", "ef_signsgd", "topk", "qsgd", "powersgd", "marsit", "scalecom"]
UNFILTERED: dict[str, dict[str, Any]] = {"scalecom": {"beta": 1.0}}  # where the memory is what is owed
EVERY = [kind for kind in KINDS if kind != "gradient"]


def worlds(scheme: str, kind: str, size: int, **keys: Any) -> World:
    return World(config(scheme, **{**SETTINGS[kind], **keys}), size)


def moments(reducer: Reducer) -> dict[str, Any]:
    """All that a direction keeps."""
    return moments_of(reducer.state_dict())


def moments_of(state: Mapping[str, Any]) -> dict[str, Any]:
    names = ("momentum", "adam_m", "adam_v", "shared_m", "shared_v", "adam_clock", "shared_clock")
    names += ("lamb_fresh", "lamb_coeff", "lamb_change", "lamb_scale")
    return {slot: named for kind in ("vectors", "tensors") for slot, named in state[kind].items() if slot in names}


def residual_of(state: Mapping[str, Any]) -> dict[str, Any]:
    return state["vectors"].get("residual", {})


def values(kept: Any) -> list[Tensor]:
    """The tensors in nested dictionaries that hold anything: there may be a place before anything is written to it."""
    if isinstance(kept, Tensor):
        return [kept] if kept.any() else []
    return [tensor for key in sorted(kept, key=str) for tensor in values(kept[key])]


def moment(world: World) -> Tensor:
    return world.reducers[0].state.kept(world.bucket, "shared_m").double()
