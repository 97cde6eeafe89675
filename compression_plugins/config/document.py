"""Reading configuration documents: YAML or JSON text, and KEY=VALUE assignments."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from ..errors import ConfigError


class _Loader(yaml.SafeLoader):
    """Safe YAML with numbers as in JSON: YAML 1.1 reads `1e-3` as text."""


_Loader.yaml_implicit_resolvers = {k: list(v) for k, v in yaml.SafeLoader.yaml_implicit_resolvers.items()}
_EXPONENT = re.compile(r"^[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$")
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _EXPONENT, list("-+.0123456789"))


def parse_yaml(text: str) -> Any:
    """The value of a YAML text; tags that would construct objects raise `yaml.YAMLError`."""
    return yaml.load(text, Loader=_Loader)  # noqa: S506 - a SafeLoader


def read_document(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The mapping in a YAML or JSON file. Raises `ConfigError`, one sentence, for anything else."""
    try:
        document = parse_yaml(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 text (byte {error.start}); save it as UTF-8") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not plain YAML: {' '.join(str(error).split())}") from None
    if not isinstance(document, dict):
        raise ConfigError(f"{path} must hold a mapping, not {type(document).__name__}")
    return document


def parse_assignments(texts: Sequence[str]) -> dict[str, Any]:
    """`["ratio=100", "eta_s=1e-3"]` as a dict; values are YAML. Raises `ConfigError` naming the text at fault."""
    values: dict[str, Any] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals or not key.strip():
            raise ConfigError(f"{text!r}: write KEY=VALUE, for example ratio=100")
        try:
            values[key.strip()] = parse_yaml(value)
        except yaml.YAMLError:
            raise ConfigError(f"{text!r}: {value!r} is not a YAML value") from None
    return values
