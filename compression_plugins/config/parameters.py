"""The key `parameters`: how weights travel from their owners to all ranks, where a host shards them.

parameters: {scheme: qsgd, bits: 4}     # codes of what has changed since every rank heard of it
parameters: {scheme: patch}             # without loss: only the values that have changed
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from ..errors import ConfigError, nearest
from ..schemes import registry
from ..schemes.base import Scheme
from ..schemes.patch import Patch


def read_parameters(value: Any, where: str) -> Scheme | None:
    """The scheme of the weights; None where the document says nothing of them.

    Raises:
        ConfigError: it names no scheme that can gather, or a key that the scheme does not have.
    """
    if value is None or isinstance(value, Scheme):
        return value
    own = {"scheme": value} if isinstance(value, str) else value
    if not isinstance(own, Mapping) or not isinstance(own.get("scheme"), str):
        raise ConfigError(
            f"{where}: parameters is a mapping with a text 'scheme', for example {{scheme: qsgd, bits: 4}}, "
            f"not {value!r}"
        )
    name = own["scheme"]
    known = {Patch.name: Patch, **{other: registry.get(other) for other in registry.names()}}
    if name not in known:
        raise ConfigError(f"{where}: parameters: unknown scheme {name!r}{nearest(name, known)}")
    cls = known[name]
    for key in own:
        if key not in {*cls.model_fields, "scheme"}:
            hint = nearest(str(key), {*cls.model_fields, "scheme"})
            raise ConfigError(f"{where}: parameters: unknown key {key!r} for scheme {name!r}{hint}")
    try:
        scheme: Scheme = cls(**{key: item for key, item in own.items() if key != "scheme"})
    except ValidationError as error:
        detail = error.errors()[0]
        place = ".".join(map(str, detail["loc"])) or "values"
        raise ConfigError(
            f"{where}: parameters: scheme {name!r}: {place} = {detail['input']!r}: {detail['msg']}"
        ) from None
    if not gathers(scheme):
        valid = sorted(other for other in known if gathers(known[other]()))
        raise ConfigError(
            f"{where}: parameters: {name!r} cannot say what has changed in a weight, and whether anything has; valid: "
            f"{', '.join(valid)}"
        )
    return scheme


def gathers(scheme: Scheme) -> bool:
    """Whether weights can travel by `scheme`: it loses nothing, or has a codec with a word for no change at all, which
    a sign has not.
    """
    return scheme.lossless or (scheme.codec is not None and scheme.says_zero)
