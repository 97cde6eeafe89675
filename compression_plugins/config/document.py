"""Reading configuration documents: YAML or JSON text, and KEY=VALUE assignments.

A document says what JSON can say, in the notation of YAML or JSON: mappings with text keys, lists, texts, true, false,
null, and finite numbers as JSON writes them. What YAML 1.1 reads in other ways (`0100` as 64, `1:30` as 90, `.inf`) is
refused. Limits hold while a text is read, so that none takes long: `MAX_BYTES`, `MAX_DEPTH` and `MAX_VALUES`.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Hashable, Sequence
from itertools import count
from pathlib import Path
from typing import Any, NoReturn

import yaml

from ..errors import ConfigError, shown

MAX_BYTES = 1 << 20
MAX_DEPTH = 32
#: Mappings, lists, texts and numbers, as often as they appear when aliases are written out.
MAX_VALUES = 20_000
_DIGITS = 40

_NUMBER = re.compile(r"-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][-+]?[0-9]+)?")
#: What YAML 1.1 or 1.2 reads as a number, for one of them is meant.
_LIKE_A_NUMBER = re.compile(
    r"[-+]?(\.?[0-9][0-9_]*(\.[0-9_]*)?([eE][-+]?[0-9]+)?|0[xob][0-9a-fA-F_]+|[0-9][0-9_]*(:[0-5]?[0-9])+(\.[0-9_]*)?"
    r"|\.(inf|Inf|INF))|\.(nan|NaN|NAN)"
)
_CORE = "tag:yaml.org,2002:"


class _Loader(yaml.SafeLoader):
    """Safe YAML, of which a part is left; see above."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth, self._values = 0, 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        self._depth, self._values = self._depth + 1, self._values + 1
        if self._depth > MAX_DEPTH or self._values > MAX_VALUES:
            _refuse_size(self._depth)
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Hashable, Any]:
        if not isinstance(node, yaml.MappingNode):
            raise _problem("a mapping was expected", node)
        known = set()
        for key, _ in node.value:
            if key.tag != f"{_CORE}str" or not isinstance(key, yaml.ScalarNode):
                raise _problem("a key must be a text", key)
            if key.value == "<<" and key.style is None:
                raise _problem("merge keys (<<) are not supported: write the keys out", key)
            if key.value in known:
                raise _problem(f"the key {shown(key.value)} stands here a second time", key)
            known.add(key.value)
        return yaml.constructor.BaseConstructor.construct_mapping(self, node, deep)

    def _number(self, node: Any) -> int | float:
        text = self.construct_scalar(node)
        try:
            return _number(text)
        except ValueError as error:
            raise _problem(str(error), node) from None

    def _boolean(self, node: Any) -> bool:
        value = self.bool_values.get(self.construct_scalar(node).lower())
        if value is None:
            raise _problem("true or false was expected", node)
        return value


def _resolvers() -> dict[str, list[tuple[str, re.Pattern[str]]]]:
    """Those of YAML 1.1 for null and booleans; one for everything that looks like a number."""
    kept = {f"{_CORE}null", f"{_CORE}bool"}
    found = {
        first: [(tag, pattern) for tag, pattern in pairs if tag in kept]
        for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    for first in "-+.0123456789":
        found.setdefault(first, []).append((f"{_CORE}float", re.compile(f"(?:{_LIKE_A_NUMBER.pattern})\\Z")))
    return found


_Loader.yaml_implicit_resolvers = _resolvers()
_Loader.yaml_constructors = {
    tag: make for tag, make in yaml.SafeLoader.yaml_constructors.items()
    if tag is None or tag.removeprefix(_CORE) in ("null", "str", "seq", "map")
}  # fmt: skip
for _tag, _make in (("int", _Loader._number), ("float", _Loader._number), ("bool", _Loader._boolean)):
    _Loader.add_constructor(_CORE + _tag, _make)


def parse_yaml(text: str) -> Any:
    """The value of a YAML text. Raises `ConfigError`, one sentence without the name of a file, for what is none."""
    _check_bytes(text)
    try:
        value = yaml.load(text, Loader=_Loader)  # noqa: S506 - a SafeLoader
        _check_size(value, count(1))
        return value
    except yaml.YAMLError as error:
        raise ConfigError(f"is not plain YAML: {_cut(_sentence(error))}") from None


def parse_json(text: str) -> Any:
    """The value of a JSON text. Raises `ConfigError` as `parse_yaml` does."""
    _check_bytes(text)
    try:
        value = json.loads(
            text,
            object_pairs_hook=_mapping,
            parse_int=_number,
            parse_float=_number,
            parse_constant=_number,
        )
        _check_size(value, count(1))
        return value
    except RecursionError:
        _refuse_size(MAX_DEPTH + 1)
    except ValueError as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"is not JSON: {_cut(str(error))}") from None


def read_document(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The mapping in a YAML file, or with the suffix .json in a JSON file. Raises `ConfigError`, one sentence, for
    anything else.
    """
    name = _cut(os.fspath(path))
    try:
        with open(path, "rb") as file:
            content = file.read(MAX_BYTES + 1)
        text = content.decode("utf-8")
    except OSError as error:
        raise ConfigError(f"cannot read {name}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        if len(content) <= MAX_BYTES:
            raise ConfigError(f"{name} is not UTF-8 text (byte {error.start}); save it as UTF-8") from None
        text = " " * len(content)  # too long, whatever it is
    except ValueError:
        raise ConfigError(f"cannot read {shown(os.fspath(path))}: no file has such a name") from None
    try:
        document = (parse_json if Path(path).suffix.lower() == ".json" else parse_yaml)(text)
    except ConfigError as error:
        raise ConfigError(f"{name} {error}") from None
    if not isinstance(document, dict):
        raise ConfigError(f"{name} must hold a mapping, not {type(document).__name__}")
    return document


def parse_assignments(texts: Sequence[str]) -> dict[str, Any]:
    """`["ratio=100", "eta_s=1e-3"]` as a dict; values are YAML. Raises `ConfigError` naming the text at fault."""
    values: dict[str, Any] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        key = key.strip()
        if not equals or not key:
            raise ConfigError(f"{shown(text)}: write KEY=VALUE, for example ratio=100")
        if key in values:
            raise ConfigError(f"{shown(text)}: {shown(key)} is set twice")
        try:
            values[key] = parse_yaml(value)
        except ConfigError as error:
            raise ConfigError(f"{shown(text)}: the value {error}") from None
    return values


def _number(text: str) -> int | float:
    """A number as JSON writes it. Raises `ValueError`, with the reason, for another text."""
    match = _NUMBER.fullmatch(text)
    if match is None:
        raise ValueError(f"{shown(text)} is not a number as JSON writes it: write another, or quote a text")
    if len(match[1]) > _DIGITS:
        raise ValueError(f"a number of {len(match[1])} digits")
    value = float(text) if match[2] or match[3] else int(text)
    if not math.isfinite(value):
        raise ValueError(f"{shown(text)} is too large for a number")
    return value


def _mapping(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for i, key in enumerate(keys) if key in keys[:i])
        raise ValueError(f"the key {shown(twice)} stands twice in one mapping")
    return values


def _check_bytes(text: str) -> None:
    if len(text) > MAX_BYTES or len(text.encode("utf-8", "surrogatepass")) > MAX_BYTES:
        raise ConfigError(f"is longer than {MAX_BYTES} bytes, and no configuration is")


def _check_size(value: Any, numbers: count[int], depth: int = 1) -> None:
    """Refuse what aliases blow up."""
    if next(numbers) > MAX_VALUES or depth > MAX_DEPTH:
        _refuse_size(depth)
    if isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            _check_size(item, numbers, depth + 1)


def _refuse_size(depth: int) -> NoReturn:
    if depth > MAX_DEPTH:
        raise ConfigError(f"is nested deeper than {MAX_DEPTH} levels, or refers to itself")
    raise ConfigError(f"holds more than {MAX_VALUES} values, aliases written out")


def _problem(text: str, node: Any) -> yaml.YAMLError:
    return yaml.MarkedYAMLError(problem=text, problem_mark=node.start_mark)


def _sentence(error: yaml.YAMLError) -> str:
    if not isinstance(error, yaml.MarkedYAMLError) or error.problem_mark is None:
        return " ".join(str(error).split())
    mark = error.problem_mark
    return f"{error.problem or error.context} (line {mark.line + 1}, column {mark.column + 1})"


def _cut(text: str, width: int = 300) -> str:
    return text if len(text) <= width else f"{text[: width - 1]}…"
