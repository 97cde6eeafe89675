"""How weights travel from their owners to all ranks under ZeRO 1, 2 and BF16_Optimizer."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from ....engine.plan import weights_row
from ....errors import ConfigError
from .base import GatheredWeights
from .codes import Codes
from .differences import Differences
from .patches import Patches

if TYPE_CHECKING:
    from ..backend import CompressedBackend
    from ..session import DeepSpeedSession


def gathered_weights(
    session: DeepSpeedSession, backend: CompressedBackend, meet: Callable[[], None]
) -> GatheredWeights | None:
    """What `parameters`, or a gradient scheme with a weight law, asks for where ranks hold partitions, or None.

    Args:
        meet: returns when every rank has called it; raises if one does not.

    Raises:
        ConfigError: two laws of the weights are asked for.
    """
    config = session.common.config
    laws = {row.name: row.scheme.weight_law for row in session.plan.rows}
    chosen = {name: law for name, law in laws.items() if law is not None}
    if len(set(chosen.values())) > 1:
        raise ConfigError(f"rules ask for several laws of the weights: {sorted(set(chosen.values()))}; use one")
    scheme = config.parameters
    if scheme is None:
        law = next(iter(chosen.values()), None)
        return Codes(session, backend, meet, set(chosen), law) if law else None
    if chosen:
        raise ConfigError(
            f"parameters: {scheme.name} and the weights of {config.scheme.name} are two ways for one thing: set "
            "weights: false, or remove parameters"
        )
    rows = [weights_row(config, spec) for spec in session.common.specs(session.common.parameters)]
    names = {row.name for row in rows if not row.reason}
    if scheme.lossless:
        return Patches(session, backend, meet, names)
    if scheme.weight_law is not None:
        return Codes(session, backend, meet, names, scheme.weight_law)
    assert scheme.codec is not None
    return Differences(session, backend, meet, names, scheme.codec)


__all__ = ["GatheredWeights", "gathered_weights"]
