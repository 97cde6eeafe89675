"""Whatever a configuration file holds, it is read as JSON says, or refused in one sentence, and soon."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from compression_plugins.adapters.deepspeed.config import parse
from compression_plugins.config import ENVIRONMENT_VARIABLE, Config, from_environment, parse_assignments
from compression_plugins.config.document import MAX_BYTES, parse_json, parse_yaml
from compression_plugins.errors import CompressionError, ConfigError
from compression_plugins.optimizer.directions import KINDS
from compression_plugins.schemes import registry

BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]\n" for before, name in zip("abcdefgh", "bcdefghi")
)
REFUSED = {
    "an alias bomb": (BOMB, "more than 20000 values, aliases written out"),
    "an alias of itself": ("scheme: &a [*a]", "refers to itself"),
    "a chain of aliases": (
        "a0: &a0 [x]\n" + "".join(f"a{i + 1}: &a{i + 1} [*a{i}]\n" for i in range(99)),
        "nested deeper than 32 levels",
    ),
    "3,000 levels": ("[" * 3000, "nested deeper than 32 levels"),
    "3,000 levels in lines": ("".join("  " * i + "a:\n" for i in range(3000))[:MAX_BYTES], "nested deeper than 32"),
    "a megabyte": ("#" * (MAX_BYTES + 1), f"longer than {MAX_BYTES} bytes"),
    "many values": ("[" + "1," * 20_000 + "]", "more than 20000 values"),
    "a key twice": (
        "scheme: qsgd\nbits: 4\nbits: 8\n",
        r"the key 'bits' stands here a second time \(line 3, column 1\)",
    ),
    "a key twice, deep down": ("scheme: qsgd\nrules: [{match: a, match: b}]", "the key 'match' stands here a second"),
    "a merged mapping": ("scheme: qsgd\n<<: {bits: 4}", "merge keys"),
    "a number as key": ("scheme: qsgd\n4: 4", "a key must be a text"),
    "a list as key": ("scheme: qsgd\n? [a]\n: 4", "a key must be a text"),
    "an octal number": ("scheme: qsgd\nblock: 0100", "'0100' is not a number as JSON writes it"),
    "a number to base 60": ("scheme: qsgd\nblock: 1:30", "'1:30' is not a number as JSON"),
    "a hexadecimal number": ("scheme: qsgd\nblock: 0x20", "'0x20' is not a number as JSON"),
    "a number with underscores": ("scheme: qsgd\nblock: 1_024", "'1_024' is not a number as JSON"),
    "a number with a plus": ("scheme: topk\nratio: +5", r"'\+5' is not a number as JSON"),
    "a number that begins with its point": ("scheme: topk\nratio: .5", "'.5' is not a number as JSON"),
    "infinity": ("scheme: topk\nratio: .inf", "'.inf' is not a number as JSON"),
    "no number": ("scheme: topk\nratio: .nan", "'.nan' is not a number as JSON"),
    "a number past fp64": ("scheme: topk\nratio: 1e999", "'1e999' is too large for a number"),
    "5,000 digits": (f"scheme: topk\nratio: {'9' * 5000}", "a number of 5000 digits"),
    "a text that is said to be a number": ("scheme: topk\nratio: !!int abc", "'abc' is not a number as JSON"),
    "nothing that is said to be a number": ("scheme: topk\nratio: !!float", "'' is not a number as JSON"),
    "a text that is said to be a boolean": ("scheme: !!bool abc", "true or false was expected"),
    "a list that is said to be a mapping": ("!!map [a]", "a mapping was expected"),
    "no date": ("scheme: topk\nratio: 2020-13-45", "ratio = '2020-13-45': input should be a valid number"),
    "a date": ("scheme: topk\nratio: 2020-01-02", "ratio = '2020-01-02': input should be a valid number"),
    "bytes": ("scheme: !!binary aGk=", "could not determine a constructor for the tag"),
    "an object": ("!!python/object/apply:os.system ['true']", "could not determine a constructor for the tag"),
    "a tag of many letters": (f"!{'a' * 100_000} b", "could not determine a constructor for the tag"),
    "a control character": ("scheme: \x01", "is not plain YAML"),
    "two documents": ("scheme: topk\n---\nscheme: topk", "is not plain YAML"),
    "a word of many letters": (f"scheme: {'q' * 100_000}", "unknown scheme 'qqq"),
    "a key of many letters": (f"scheme: qsgd\n{'q' * 1000}: 1", "unknown key 'qqq"),
    "a value of many letters": (f"scheme: qsgd\nblock: {'q' * 100_000}", "block = 'qqq"),
    "a list of many": (f"scheme: qsgd\nblock: [{'1,' * 10_000}]", r"block = \[1, 1, 1, 1, 1, 1, \.\.\.\]"),
}
REFUSED_JSON = {
    "a list": ("[1]", r"must hold a mapping, not \[1\]"),
    "a number": ("1", "must hold a mapping, not 1"),
    "null": ("null", "must hold a mapping, not None"),
    "NaN": ('{"scheme": "topk", "ratio": NaN}', "'NaN' is not a number as JSON"),
    "infinity": ('{"scheme": "topk", "ratio": -Infinity}', "'-Infinity' is not a number as JSON"),
    "a number past fp64": ('{"scheme": "topk", "ratio": 1e999}', "'1e999' is too large"),
    "5,000 digits": (f'{{"scheme": "topk", "ratio": {"9" * 5000}}}', "a number of 5000 digits"),
    "a key twice": ('{"scheme": "topk", "scheme": "qsgd"}', "the key 'scheme' stands twice in one mapping"),
    "30,000 levels": ("[" * 30_000, "nested deeper than 32 levels"),
    "40 levels": ("[" * 40 + "]" * 40, "nested deeper than 32 levels"),
    "a megabyte": (" " * (MAX_BYTES + 1), f"longer than {MAX_BYTES} bytes"),
    "YAML": ("scheme: topk", "is not JSON: Expecting value"),
}


def check(message: str, began: float) -> None:
    assert "\n" not in message and len(message) < 1000
    assert time.monotonic() - began < 60, "no input of this size may take long"  # a hang, not a benchmark


@pytest.mark.parametrize("name", REFUSED)
def test_what_json_cannot_say_is_refused_in_one_sentence(name: str, tmp_path: Path) -> None:
    text, message = REFUSED[name]
    path = tmp_path / "c.yaml"
    path.write_text(text)
    began = time.monotonic()
    with pytest.raises(ConfigError, match=message) as caught:
        Config.load(path)
    assert str(path) in str(caught.value)
    check(str(caught.value), began)


@pytest.mark.parametrize("name", REFUSED_JSON)
def test_a_configuration_from_the_environment_or_a_json_file_is_refused_alike(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text, message = REFUSED_JSON[name]
    if len(text) < 1 << 17:  # longer ones no environment holds
        monkeypatch.setenv(ENVIRONMENT_VARIABLE, text)
        with pytest.raises(ConfigError, match=message) as caught:
            from_environment()
        assert str(caught.value).startswith(f"environment variable {ENVIRONMENT_VARIABLE} ")
        check(str(caught.value), time.monotonic())
    path = tmp_path / "c.json"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        Config.load(path)
    check(str(caught.value), time.monotonic())


def test_numbers_texts_and_aliases_are_read_as_json_would() -> None:
    text = (
        "a: [0, -7, 1.5, 1e3, 1E-3, -0.0, 12345678901234567890]\n"
        "b: &b {c: 1.2.3, d: 2020-01-02, e: '0100', f: !!str 1, g: 12:30:99x}\n"
        "h: *b\n"
        "i: [~, null, true, False, -, '.', a.b, 127.0.0.1]\n"
    )
    inner = {"c": "1.2.3", "d": "2020-01-02", "e": "0100", "f": "1", "g": "12:30:99x"}
    assert parse_yaml(text) == {
        "a": [0, -7, 1.5, 1000.0, 1e-3, 0.0, 12345678901234567890],
        "b": inner,
        "h": inner,
        "i": [None, None, True, False, "-", ".", "a.b", "127.0.0.1"],
    }


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**30), 10**30)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=("Cs", "Cc")), max_size=20),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(st.characters(codec="ascii")), inner, max_size=4)
    ),
    max_leaves=20,
)


@given(json_values)
@settings(deadline=None, max_examples=100)
def test_every_json_value_is_read_as_it_is(value: Any) -> None:
    assert parse_json(json.dumps(value)) == value


WORDS = (
    "scheme qsgd scalecom ratio block rules match direction kind outer exempt seed 0 1 64 0.5 1e9 1e999 .inf 0100 1:30"
)
SIGNS = [": ", ":", "- ", "\n", "\n  ", *"{}[]'\"=%~\t\x00", ", ", "&a ", "*a", "!!int ", "!!map ", "? ", "| ", "<<"]
tokens = st.lists(st.sampled_from([*WORDS.split(), "true", "null", *SIGNS]), max_size=30)


@given(
    st.binary(max_size=200)
    | tokens.map(lambda parts: "".join(parts).encode())
    | json_values.map(lambda value: json.dumps(value).encode())
)
@example(b"scheme: qsgd")
@settings(deadline=None, max_examples=300)
def test_any_bytes_are_a_configuration_or_one_error(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    for suffix in (".yaml", ".json"):
        file = path.with_suffix(suffix)
        file.write_bytes(content)
        try:
            assert isinstance(Config.load(file), Config)
        except CompressionError as error:
            check(str(error), time.monotonic())


@pytest.mark.parametrize("name", registry.names())
def test_no_parameter_of_a_scheme_is_without_bounds(name: str) -> None:
    for key, value in registry.get(name)().model_dump().items():
        kind = str(registry.get(name).model_fields[key].annotation)
        if isinstance(value, bool) or not ("int" in kind or "float" in kind):
            continue
        for wrong in (*[2**60] * ("int" in kind), float("inf"), float("nan"), 10**5000, 1e300, -(2**60)):
            with pytest.raises(ConfigError) as caught:
                Config.load({"scheme": name, key: wrong})
            check(str(caught.value), time.monotonic())


@pytest.mark.parametrize("kind", KINDS)
def test_no_parameter_of_a_direction_is_without_bounds(kind: str) -> None:
    for key in set(KINDS[kind].model_fields) - {"kind"}:
        for wrong in (2**60, float("inf"), float("nan"), 10**5000, -1):
            with pytest.raises(ConfigError) as caught:
                Config.load({"scheme": "none", "direction": {"kind": kind, key: wrong}})
            check(str(caught.value), time.monotonic())


@pytest.mark.parametrize("key", ["warmup_steps", "min_numel", "every", "bucket_mb", "seed", "outer"])
def test_no_general_key_is_without_bounds(key: str) -> None:
    for wrong in (2**60, float("inf"), float("nan"), 10**5000, -1):
        with pytest.raises(ConfigError):
            Config.load({"scheme": "none", key: wrong})


def test_a_name_that_no_file_can_have_is_refused_in_one_sentence() -> None:
    for name in ("a" * 100_000, "a\0b", "a\0b.yaml", f"{'a' * 100_000}.yaml", "\ud800.yaml", ""):
        with pytest.raises(ConfigError) as caught:
            Config.load(name)
        check(str(caught.value), time.monotonic())
    with pytest.raises(ConfigError, match="a name, a path or a mapping, not 3"):
        Config.load(3)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="a key must be a text, not 3"):
        Config.load({"scheme": "none", 3: 4})  # type: ignore[dict-item]


def test_a_setting_that_is_given_twice_is_refused() -> None:
    with pytest.raises(ConfigError, match="'ratio' is set twice"):
        parse_assignments(["ratio=3", "ratio=4"])
    with pytest.raises(ConfigError, match=r"'ratio=0100': the value is not plain YAML: '0100' is not a number"):
        parse_assignments(["ratio=0100"])


def test_the_block_of_a_deepspeed_config_is_bounded_alike() -> None:
    for block in ([1], 1, {"scheme": "qsgd", "block": 2**60}, {"enabled": "x" * 10**6}, {"file": ["x" * 10**6]}):
        with pytest.raises(ConfigError) as caught:
            parse(block)
        check(str(caught.value), time.monotonic())
